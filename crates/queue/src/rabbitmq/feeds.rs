//! What comes in beside the jobs: wishes to cancel, and, for a gateway, results and events.
//!
//! Each feed is a loop: wait for the consuming connection, open a channel, subscribe, catch up with
//! what was missed, then handle what comes until the channel ends; then again.
//!
//! A `finished` event is told to subscribers only once the result is in the index, and only after
//! the output that came before it: it waits for both the result and the broker's event, but for the
//! latter not long, since events may be lost and results may not.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use hutch_proto::{Event, EventKind, JobId, JobResult, Reason, Timestamp};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::time::{Instant, timeout};

use super::calls;
use super::core::Core;
use super::index::Index;
use super::message;
use super::records::Record;
use super::supervisor::STEP;
use super::topology;
use crate::QueueError;
use crate::views::state;

/// Results that are noted in one transaction.
const RESULTS_AT_ONCE: u16 = 64;
/// How long a `finished` event waits for the output before it.
const EVENT_GRACE: Duration = Duration::from_millis(500);
/// How often expired jobs are looked for where none is known to expire.
const LOOK: Duration = Duration::from_secs(30);
/// The pause before a feed that ended begins again.
const PAUSE: Duration = Duration::from_millis(500);

/// Runs one feed until the queue is closed.
async fn keep_fed<F: Future<Output = Result<(), QueueError>>>(
    core: &Core,
    name: &str,
    mut feed: impl FnMut(Channel) -> F,
) {
    loop {
        let fed = async {
            let live = core.consume.live().await?;
            let opened = timeout(STEP, live.connection.create_channel()).await;
            let channel = opened.map_err(|_| late(name))?.map_err(|e| unavailable(&e))?;
            feed(channel).await
        };
        match core.closing.run_until_cancelled(fed).await {
            None | Some(Err(QueueError::Closed)) => return,
            Some(Err(e)) => tracing::warn!(feed = name, error = %e, "a feed ended, beginning again"),
            Some(Ok(())) => tracing::info!(feed = name, "a feed ended, beginning again"),
        }
        if core.closing.run_until_cancelled(tokio::time::sleep(PAUSE)).await.is_none() {
            return;
        }
    }
}

pub(super) fn unavailable(error: &lapin::Error) -> QueueError {
    QueueError::Unavailable(error.to_string())
}

pub(super) fn late(what: &str) -> QueueError {
    QueueError::Unavailable(format!("{what}: no answer in {STEP:?}"))
}

pub(super) async fn consume(
    channel: &Channel,
    queue: ShortString,
    no_ack: bool,
) -> Result<lapin::Consumer, QueueError> {
    let options = BasicConsumeOptions { no_ack, ..Default::default() };
    let consuming = channel.basic_consume(queue, ShortString::default(), options, FieldTable::default());
    timeout(STEP, consuming).await.map_err(|_| late("consume"))?.map_err(|e| unavailable(&e))
}

/// Hears of wishes to cancel, and of new bands.
pub(super) async fn control(core: Arc<Core>) {
    let core = &core;
    keep_fed(core, "control", move |channel| async move {
        let declared =
            topology::declare_private(&channel, topology::CONTROL, &["cancel.#", "band.#", "exec.#"]);
        let queue =
            timeout(STEP, declared).await.map_err(|_| late("declare"))?.map_err(|e| unavailable(&e))?;
        let mut messages = consume(&channel, queue.clone(), true).await?;
        catch_up(core).await?;
        let mut waiting = core.bell.watch();
        waiting.mark_changed();
        let mut bells: BTreeSet<String> = BTreeSet::new();
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                _ = waiting.changed() => {
                    let sources = waiting.borrow_and_update().sources.clone();
                    let queues: BTreeSet<String> = sources.into_iter().map(|source| source.queue).collect();
                    for name in queues.difference(&bells) {
                        let key = format!("bell.{name}");
                        let binding = topology::bind(&channel, queue.as_str(), topology::CONTROL, &key);
                        let bound = timeout(STEP, binding).await.map_err(|_| late("bind"))?;
                        bound.map_err(|e| unavailable(&e))?;
                    }
                    bells = queues;
                    continue;
                }
            };
            let Some(message) = message else { return Ok(()) };
            let message = message.map_err(|e| unavailable(&e))?;
            let outcome = match message.routing_key.as_str().split_once('.') {
                Some(("bell", _)) => {
                    core.bell.ring();
                    Ok(())
                }
                Some(("cancel", id)) => match id.parse() {
                    Ok(id) => call_off(core, id).await,
                    Err(_) => Ok(()),
                },
                Some((calls::KEY, id)) => {
                    pick_up(core, id, message.properties.reply_to().clone());
                    Ok(())
                }
                Some(("band", queue)) => core.refresh_bands(queue).await,
                _ => Ok(()),
            };
            if let Err(e) = outcome {
                tracing::warn!(key = %message.routing_key, error = %e, "a message of control was lost");
            }
        }
    })
    .await;
}

/// Answers a call about a job that is in hand here.
fn pick_up(core: &Arc<Core>, id: &str, caller: Option<ShortString>) {
    if let (Ok(id), Some(caller)) = (id.parse(), caller)
        && core.lock_held().contains_key(&id)
    {
        tokio::spawn(calls::answer(Arc::clone(core), id, caller));
    }
}

/// What may have been said while nobody listened.
async fn catch_up(core: &Core) -> Result<(), QueueError> {
    let queues: Vec<String> = core.bands.borrow().keys().cloned().collect();
    for queue in queues {
        core.refresh_bands(&queue).await?;
    }
    let held: Vec<JobId> = core.lock_held().keys().copied().collect();
    for id in held {
        if core.records.is_cancelled(id).await? {
            tell_holder(core, id);
        }
    }
    Ok(())
}

fn tell_holder(core: &Core, id: JobId) -> bool {
    let mut all = core.lock_held();
    let Some(held) = all.get_mut(&id) else { return false };
    held.litter = true;
    held.wanted_off.cancel();
    true
}

/// A job that is not in hand here gets a mark, so that also a wish that came by AMQP alone is kept
/// until the job is taken.
async fn call_off(core: &Core, id: JobId) -> Result<(), QueueError> {
    if tell_holder(core, id) || core.records.is_cancelled(id).await? || core.records.get(id).await?.is_some()
    {
        return Ok(());
    }
    core.records.mark_cancelled(id).await
}

/// `finished` events that wait for their other half.
#[derive(Default)]
pub(super) struct Finishing(Mutex<HashMap<JobId, Half>>);

enum Half {
    /// The result is in the index; told at this moment at the latest.
    Result(Event, Instant),
    /// The broker's event has come; forgotten at this moment if no result comes.
    Event(Instant),
}

impl Finishing {
    /// The result has come. Returns the event if it can be told now.
    fn result(&self, event: Event) -> Option<Event> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Half::Event(_)) = waiting.remove(&event.id) {
            return Some(event);
        }
        waiting.insert(event.id, Half::Result(event, Instant::now() + EVENT_GRACE));
        None
    }

    /// The event has come. Returns what can be told now.
    fn event(&self, id: JobId) -> Option<Event> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Half::Result(event, _)) = waiting.remove(&id) {
            return Some(event);
        }
        waiting.insert(id, Half::Event(Instant::now() + LOOK));
        None
    }

    /// Those that have waited long enough.
    fn due(&self) -> Vec<Event> {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, half| match half {
            Half::Result(event, at) if *at <= now => {
                due.push(event.clone());
                false
            }
            Half::Event(at) => *at > now,
            Half::Result(..) => true,
        });
        due
    }
}

/// Notes every result in the index.
pub(super) async fn results(core: Arc<Core>, finishing: Arc<Finishing>) {
    let (core, finishing) = (&*core, &*finishing);
    let Some(index) = &core.index else { return };
    keep_fed(core, "results", move |channel| async move {
        let opening = async {
            topology::declare_gateway(&channel, index.gateway()).await?;
            channel.basic_qos(RESULTS_AT_ONCE, BasicQosOptions::default()).await
        };
        timeout(STEP, opening).await.map_err(|_| late("declare"))?.map_err(|e| unavailable(&e))?;
        let messages = consume(&channel, index.gateway().into(), false).await?;
        let mut chunks = messages.ready_chunks(RESULTS_AT_ONCE.into());
        while let Some(chunk) = chunks.next().await {
            let mut deliveries = Vec::with_capacity(chunk.len());
            for delivery in chunk {
                deliveries.push(delivery.map_err(|e| unavailable(&e))?);
            }
            note_results(core, index, finishing, &deliveries).await?;
            if let Some(last) = deliveries.last() {
                let options = BasicAckOptions { multiple: true };
                last.acker.ack(options).await.map_err(|e| unavailable(&e))?;
            }
        }
        Ok(())
    })
    .await;
}

async fn note_results(
    core: &Core,
    index: &Index,
    finishing: &Finishing,
    deliveries: &[Delivery],
) -> Result<(), QueueError> {
    let mut results = Vec::new();
    let mut events = Vec::new();
    for delivery in deliveries {
        let Ok(record) = Record::read(delivery.data.clone().into()) else {
            tracing::warn!(key = %delivery.routing_key, "a message among the results is none");
            continue;
        };
        events.push(finished_event(&record.result, message::seq_of(&delivery.properties)));
        results.push((record, message::queue_of(delivery.routing_key.as_str()).to_owned()));
    }
    let news = core.insist(&core.closing, || index.finished(results.clone())).await?;
    for (event, news) in events.into_iter().zip(news) {
        if news && let Some(event) = finishing.result(event) {
            // Without subscribers there is nobody to tell.
            let _ = core.events.send(event);
        }
    }
    Ok(())
}

fn finished_event(result: &JobResult, seq: Option<u64>) -> Event {
    Event {
        id: result.id,
        attempt: result.attempt,
        seq: seq.unwrap_or(1),
        at: result.timeline.finished_at,
        kind: EventKind::Finished { status: result.status, reason: result.reason },
    }
}

/// Passes on every event, and notes which jobs run.
pub(super) async fn events(core: Arc<Core>, finishing: Arc<Finishing>) {
    let (core, finishing) = (&*core, &*finishing);
    keep_fed(core, "events", move |channel| async move {
        let declared = topology::declare_private(&channel, topology::EVENTS, &["#"]);
        let queue =
            timeout(STEP, declared).await.map_err(|_| late("declare"))?.map_err(|e| unavailable(&e))?;
        let mut messages = consume(&channel, queue, true).await?;
        while let Some(message) = messages.next().await {
            let message = message.map_err(|e| unavailable(&e))?;
            let Ok(event) = serde_json::from_slice::<Event>(&message.data) else { continue };
            pass_on(core, finishing, event).await;
        }
        Ok(())
    })
    .await;
}

async fn pass_on(core: &Core, finishing: &Finishing, event: Event) {
    let event = match (&event.kind, &core.index) {
        (EventKind::Started { .. }, Some(index)) => {
            if let Err(e) = index.running(event.id, event.at).await {
                tracing::warn!(job = %event.id, error = %e, "a job that runs is not shown so");
            }
            Some(event)
        }
        (EventKind::Finished { .. }, Some(_)) => finishing.event(event.id),
        _ => Some(event),
    };
    if let Some(event) = event {
        // Without subscribers there is nobody to tell.
        let _ = core.events.send(event);
    }
}

/// Tells ends whose events were lost.
pub(super) async fn late_ends(core: Arc<Core>, finishing: Arc<Finishing>) {
    while core.closing.run_until_cancelled(tokio::time::sleep(EVENT_GRACE / 2)).await.is_some() {
        for event in finishing.due() {
            let _ = core.events.send(event);
        }
    }
}

/// Settles jobs that expired while no worker looked at them, and forgets old ones.
pub(super) async fn expiry(core: Arc<Core>, keep_finished: Option<Duration>) {
    let Some(index) = &core.index else { return };
    let mut next_prune = Instant::now();
    loop {
        let wait = match settle_expired(&core, index).await {
            Ok(Some(next)) => next.since(Timestamp::now()).min(LOOK),
            Ok(None) => LOOK,
            Err(e) => {
                tracing::warn!(error = %e, "expired jobs cannot be settled now");
                PAUSE
            }
        };
        if let Some(keep) = keep_finished.filter(|_| Instant::now() >= next_prune) {
            next_prune = Instant::now() + LOOK * 10;
            prune(index, keep).await;
        }
        tokio::select! {
            () = tokio::time::sleep(wait + Duration::from_millis(1)) => {}
            () = core.new_expiry.notified() => {}
            () = core.closing.cancelled() => return,
        }
    }
}

async fn prune(index: &Index, keep: Duration) {
    let age = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
    let moment = Timestamp::from_unix_ms(Timestamp::now().unix_ms().saturating_sub(age));
    loop {
        match index.prune(moment).await {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) => {
                tracing::warn!(error = %e, "old jobs cannot be removed");
                return;
            }
        }
    }
}

async fn settle_expired(core: &Core, index: &Index) -> Result<Option<Timestamp>, QueueError> {
    let (due, next) = index.expired().await?;
    for entry in due {
        // A worker that began with it has noted so, even where its event was lost.
        if entry.state != state::QUEUED || !core.records.ledger(entry.id).await?.is_empty() {
            index.drop_expiry(entry.id).await?;
            continue;
        }
        core.pronounce_without_run(&entry, Reason::Expired, "not started within expires_in_ms").await?;
        index.drop_expiry(entry.id).await?;
    }
    Ok(next)
}

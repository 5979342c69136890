//! What becomes of a message that was delivered: a job for the worker, or something to settle first.
//!
//! In order: it is read (what is no job goes to the dead letters, and if it names an id also gets a
//! result); if it lacks an id or waits in the wrong place, a mended copy takes its place; if its job
//! is in hand here already, it joins it; then the store is asked whether the job has ended before,
//! was cancelled, and how often it was tried. Only what passes all of this is seen by a worker.

use std::time::Duration;

use hutch_proto::{JobId, JobResult, JobSpec, Reason, SpecError, Timestamp};
use lapin::message::Delivery;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::core::{Core, Hold, nack};
use super::message::{Parcel, message_id};
use super::records::Ledger;
use super::topology::{DELIVERY_LIMIT, PLAIN_PRIORITY, Source};
use crate::{Lease, QueueError, Token};

/// Deliveries before the broker's limit at which a message is renewed, so that the broker never
/// gives up one of which hutch has not settled the job.
const RENEW_BEFORE: u32 = 20;
/// How often the store is asked while a job's worker may yet show that it lives.
const LOOK: Duration = Duration::from_millis(500);

/// A job that may be run.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) lease: Lease,
    /// Counts the deliveries of this job.
    pub(super) number: u32,
    pub(super) wanted_off: CancellationToken,
}

/// What a message was.
pub(super) enum Admitted {
    /// A job to run.
    Run(Box<Job>),
    /// Something that is settled; these messages of it may now be acknowledged.
    Settled(Vec<Parcel>),
}

/// How a job ends that no program decided over.
pub(super) struct Ending<'a> {
    pub(super) reason: Reason,
    pub(super) message: String,
    pub(super) attempt: u32,
    pub(super) worker: &'a str,
}

impl Ending<'static> {
    fn untried(reason: Reason, message: &str) -> Self {
        Self { reason, message: message.to_owned(), attempt: 0, worker: "" }
    }
}

/// What a message says of its way here.
struct Arrival {
    came_before: bool,
    /// How often it was returned, at least.
    returned: u32,
    submitted_at: Timestamp,
    token: u64,
    wanted_off: CancellationToken,
}

/// The little that decides what to do with a message, read without trusting the rest.
#[derive(Deserialize)]
struct Peek {
    id: Option<serde_json::Value>,
    priority: Option<serde_json::Value>,
}

/// A message, read.
pub(super) enum Seen {
    /// A job, and whether somebody gave it an id.
    Job { spec: Box<JobSpec>, named: bool },
    /// Not a job.
    Wrong { id: Option<JobId>, why: SpecError },
}

pub(super) fn read(parcel: &Parcel) -> Seen {
    let peek = serde_json::from_slice::<Peek>(&parcel.delivery.data).ok();
    let id = id_of(&parcel.delivery);
    let mut spec = match JobSpec::parse(&parcel.delivery.data) {
        Ok(spec) => spec,
        Err(why) => return Seen::Wrong { id, why },
    };
    if let Some(id) = id {
        spec.id = id;
    }
    // Where a message waits decides, not what it says: its sender chose the routing key as well.
    spec.queue.clone_from(&parcel.source.queue);
    let silent = peek.is_none_or(|peek| peek.priority.is_none());
    if let Some(priority) = parcel.delivery.properties.priority().filter(|_| silent) {
        spec.priority = priority.min(31);
    }
    Seen::Job { spec: Box::new(spec), named: id.is_some() }
}

impl Core {
    /// Decides over a message. If it is not alone, others wait behind it, and it may be for one of them.
    ///
    /// # Errors
    /// [`QueueError::Closed`] if `gone`; then the message goes back with its channel.
    pub(super) async fn admit(
        &self,
        parcel: Parcel,
        alone: bool,
        gone: &CancellationToken,
    ) -> Result<Admitted, QueueError> {
        if parcel.delivery.redelivered {
            self.redeliveries.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        let (spec, named) = match read(&parcel) {
            Seen::Job { spec, named } => (spec, named),
            Seen::Wrong { id, why } => {
                return self.refuse(parcel, id, &why, gone).await.map(Admitted::Settled);
            }
        };
        let worn = parcel.delivery_count() + RENEW_BEFORE >= DELIVERY_LIMIT;
        let sunk = parcel.source.band.is_none() && spec.priority < PLAIN_PRIORITY;
        let misplaced = !named || sunk || (parcel.is_unsorted() && !alone);
        if misplaced || worn {
            if parcel.is_unsorted() {
                self.insist(gone, || self.mark(&spec.queue)).await?;
            }
            let band = if misplaced { Some(spec.priority) } else { parcel.source.band };
            let to = Source { queue: spec.queue.clone(), band };
            let copy = parcel.moved_to(&to, spec.id);
            self.insist(gone, || self.publish_job(&copy, &to)).await?;
            return Ok(Admitted::Settled(vec![parcel]));
        }
        self.admit_job(parcel, *spec, gone).await
    }

    async fn admit_job(
        &self,
        parcel: Parcel,
        spec: JobSpec,
        gone: &CancellationToken,
    ) -> Result<Admitted, QueueError> {
        let id = spec.id;
        let (came_before, submitted_at) = (parcel.came_before(), parcel.submitted_at());
        let returned = parcel.delivery_count().max(u32::from(parcel.delivery.redelivered));
        let Hold::Taken { token, wanted_off } = self.hold(id, parcel) else {
            return Ok(Admitted::Settled(Vec::new()));
        };
        let arrival = Arrival { came_before, returned, submitted_at, token, wanted_off };
        let admitted = self.admit_held(spec, arrival, gone).await;
        if admitted.is_err() {
            self.let_fall(id, token).await;
        }
        admitted
    }

    /// Forgets a job over which it could not be decided. Its message goes back when the slot closes its
    /// channel, as it does after any error: put back before that, it would make room for another.
    async fn let_fall(&self, id: JobId, token: u64) {
        if let Err(e) = self.records.note_unspent(id).await {
            tracing::warn!(job = %id, error = %e, "a job that was not tried has lost an attempt");
        }
        for joined in self.take_out(id, token).into_iter().skip(1) {
            nack(&joined).await;
        }
    }

    async fn admit_held(
        &self,
        spec: JobSpec,
        arrival: Arrival,
        gone: &CancellationToken,
    ) -> Result<Admitted, QueueError> {
        let Arrival { came_before, returned, submitted_at, token, wanted_off } = arrival;
        let (id, queue) = (spec.id, spec.queue.clone());
        let ledger = if came_before {
            self.insist(gone, || self.records.ledger(id)).await?
        } else {
            Ledger::default()
        };
        let number = ledger.started.max(returned) + 1;
        let attempt = number.saturating_sub(ledger.unspent).max(1);
        // Beyond the last attempt, but the last delivery was never tried: then this is the last attempt.
        let out = attempt > spec.max_attempts && ledger.started + 1 == number;
        let attempt = attempt.min(spec.max_attempts);
        if came_before || spec.expires_in_ms.is_some() || attempt == spec.max_attempts {
            self.mark_litter(id);
            self.insist(gone, || self.records.note_started(id, number)).await?;
        }
        // Asked after the note above: a gateway that settles what expired looks for the note first.
        let (there, cancelled) = tokio::try_join!(
            self.insist(gone, || self.records.get(id)),
            self.insist(gone, || self.records.is_cancelled(id)),
        )?;
        if let Some(there) = there {
            return self.conclude(there, &queue, gone).await.map(|(_, done)| Admitted::Settled(done));
        }
        let ending = if cancelled {
            self.mark_litter(id);
            Some(Ending::untried(Reason::Requested, "cancelled as asked"))
        } else if is_over(&spec, submitted_at) {
            Some(Ending::untried(Reason::Expired, "not started within expires_in_ms"))
        } else if out {
            self.last_words(id, number, &ledger, &spec, gone).await?
        } else {
            None
        };
        if let Some(ending) = ending {
            return self.settle(&spec, submitted_at, ending, gone).await.map(Admitted::Settled);
        }
        self.sequences.begin(id, attempt);
        let lease = Lease { job: spec, attempt, submitted_at, token: Token(token) };
        Ok(Admitted::Run(Box::new(Job { lease, number, wanted_off })))
    }

    /// Settles a job that is in hand and that no program decided over; with a dead letter where its
    /// attempts ran out.
    pub(super) async fn settle(
        &self,
        spec: &JobSpec,
        submitted_at: Timestamp,
        ending: Ending<'_>,
        gone: &CancellationToken,
    ) -> Result<Vec<Parcel>, QueueError> {
        let Ending { reason, message, attempt, worker } = ending;
        if matches!(reason, Reason::WorkerLost | Reason::HostError) {
            let text = format!("{reason}: {message}");
            let letter = self
                .lock_held()
                .get(&spec.id)
                .and_then(|held| held.parcels.first().map(|parcel| parcel.dead(Some(spec.id), &text)));
            if let Some(letter) = letter {
                self.insist(gone, || async { Ok(self.publisher.publish(&letter).await?) }).await?;
            }
        }
        let mut result = JobResult::without_run(spec.id, spec.labels.clone(), submitted_at, reason, message);
        result.attempt = attempt;
        worker.clone_into(&mut result.worker);
        self.conclude_without_run(result, &spec.queue, gone).await
    }

    /// Why a job whose attempts are spent ends; none if it turns out that they are not.
    ///
    /// A worker that was cut off from the broker, but lives, says so in the ledger or brings the
    /// result itself; it gets a moment for that.
    async fn last_words(
        &self,
        id: JobId,
        number: u32,
        ledger: &Ledger,
        spec: &JobSpec,
        gone: &CancellationToken,
    ) -> Result<Option<Ending<'static>>, QueueError> {
        let most = spec.max_attempts;
        let failure = self.insist(gone, || self.records.failure_of(ledger, number - 1)).await?;
        if let Some(failure) = failure {
            let message = format!("attempt {most} of {most}: {}", failure.message);
            return Ok(Some(Ending { reason: failure.reason, message, attempt: most, worker: "" }));
        }
        let patience = tokio::time::Instant::now() + self.lost_grace;
        while tokio::time::Instant::now() < patience {
            tokio::time::sleep(LOOK).await;
            let (now, ended) = tokio::try_join!(
                self.insist(gone, || self.records.ledger(id)),
                self.insist(gone, || self.records.get(id)),
            )?;
            // Where a record has come, creating another returns that one.
            if ended.is_some() {
                break;
            }
            if number.saturating_sub(now.unspent).max(1) <= most {
                return Ok(None);
            }
        }
        let message = format!("attempt {most} of {most}: its worker was lost and said nothing");
        Ok(Some(Ending { reason: Reason::WorkerLost, message, attempt: most, worker: "" }))
    }

    /// Keeps what is no job among the dead letters; answers where an id is known.
    pub(super) async fn refuse(
        &self,
        parcel: Parcel,
        id: Option<JobId>,
        why: &SpecError,
        gone: &CancellationToken,
    ) -> Result<Vec<Parcel>, QueueError> {
        tracing::warn!(queue = parcel.source.key(), job = ?id, why = %why, "a message is no job");
        let letter = parcel.dead(id, &format!("{}: {why}", Reason::SpecInvalid));
        self.insist(gone, || async { Ok(self.publisher.publish(&letter).await?) }).await?;
        let Some(id) = id else { return Ok(vec![parcel]) };
        let (queue, submitted_at) = (parcel.source.queue.clone(), parcel.submitted_at());
        let Hold::Taken { token, .. } = self.hold(id, parcel) else { return Ok(Vec::new()) };
        let labels = std::collections::BTreeMap::new();
        let result = JobResult::without_run(id, labels, submitted_at, Reason::SpecInvalid, why.to_string());
        let concluded = self.conclude_without_run(result, &queue, gone).await;
        if concluded.is_err() {
            self.let_fall(id, token).await;
        }
        concluded
    }
}

fn is_over(spec: &JobSpec, submitted_at: Timestamp) -> bool {
    spec.expires_in_ms.is_some_and(|ms| Timestamp::now().since(submitted_at) >= Duration::from_millis(ms))
}

/// The id that a message names, whatever else is wrong with it.
pub(super) fn id_of(delivery: &Delivery) -> Option<JobId> {
    let peek = serde_json::from_slice::<Peek>(&delivery.data).ok();
    let own = peek.and_then(|peek| peek.id?.as_str()?.parse().ok());
    own.or_else(|| message_id(&delivery.properties))
}

//! Wakes slots that wait for several queues at once.
//!
//! Such a slot cannot be subscribed: it would be brought a job from each queue. It could end the
//! other subscriptions when the first job comes, but a quorum queue may send a message after it has
//! confirmed the end, and nobody would know of that message until the channel closes. So the slot asks
//! each queue by `basic.get`, which is exact, but costs the broker a write even when the queue is
//! empty, and so must not be done for nothing.
//!
//! Two things ring: `bell.<queue>`, which a gateway publishes after each job; and a watch, one for
//! the process, which looks at the queues' lengths (a read for the broker) while a slot waits, more
//! often when there was something to do lately. The watch is for jobs from elsewhere and for those
//! that were put back. A ring wakes one slot, and a slot that found a job rings on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lapin::Channel;
use tokio::sync::{Notify, futures::Notified, watch};
use tokio::time::timeout;

use super::core::Core;
use super::supervisor::STEP;
use super::topology::{self, Source};
use crate::QueueError;

/// How often the queues' lengths are looked at, at most and at least.
const OFTEN: Duration = Duration::from_millis(25);
const SELDOM: Duration = Duration::from_millis(400);

/// See the module.
pub(super) struct Bell {
    ring: Notify,
    busy: Notify,
    waiting: watch::Sender<Waiting>,
}

/// Who waits, and for what.
#[derive(Debug, Clone, Default)]
pub(super) struct Waiting {
    slots: usize,
    /// All queues that any slot ever waited for in this way.
    pub(super) sources: BTreeSet<Source>,
}

/// Counts a slot as waiting.
pub(super) struct Wait<'a>(&'a Bell);

impl Bell {
    pub(super) fn new() -> Self {
        Self { ring: Notify::new(), busy: Notify::new(), waiting: watch::Sender::default() }
    }

    /// Wakes one slot, or the next that waits.
    pub(super) fn ring(&self) {
        self.ring.notify_one();
    }

    /// A slot found a job: others may find more.
    pub(super) fn ring_on(&self) {
        self.busy.notify_one();
        self.ring();
    }

    /// Completes at the next ring.
    pub(super) fn rung(&self) -> Notified<'_> {
        self.ring.notified()
    }

    /// Notes that a slot waits for these queues.
    pub(super) fn wait(&self, sources: &[Source]) -> Wait<'_> {
        self.waiting.send_if_modified(|waiting| {
            waiting.slots += 1;
            let before = waiting.sources.len();
            for source in sources {
                if !waiting.sources.contains(source) {
                    waiting.sources.insert(source.clone());
                }
            }
            waiting.slots == 1 || waiting.sources.len() > before
        });
        Wait(self)
    }

    pub(super) fn watch(&self) -> watch::Receiver<Waiting> {
        self.waiting.subscribe()
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.waiting.send_if_modified(|waiting| {
            waiting.slots -= 1;
            false
        });
    }
}

/// Looks at the queues' lengths while a slot waits.
pub(super) async fn watch(core: Arc<Core>) {
    let mut waiting = core.bell.watch();
    let mut pause = OFTEN;
    let mut channel = None;
    loop {
        let sources = tokio::select! {
            found = waiting.wait_for(|waiting| waiting.slots > 0) => match found {
                Ok(waiting) => waiting.sources.clone(),
                Err(_) => return,
            },
            () = core.closing.cancelled() => return,
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(SELDOM),
            () = core.bell.busy.notified() => {
                pause = OFTEN;
                continue;
            }
            () = core.closing.cancelled() => return,
        }
        match core.closing.run_until_cancelled(look(&core, &mut channel, &sources)).await {
            None => return,
            Some(Ok(true)) => core.bell.ring(),
            Some(Ok(false)) => {}
            Some(Err(e)) => {
                tracing::debug!(error = %e, "cannot look at the queues now");
                channel = None;
            }
        }
    }
}

/// Whether anything waits in these queues.
async fn look(
    core: &Core,
    channel: &mut Option<(u64, Channel)>,
    sources: &BTreeSet<Source>,
) -> Result<bool, QueueError> {
    let live = core.consume.live().await?;
    let usable = channel
        .take()
        .filter(|(generation, channel)| *generation == live.generation && channel.status().connected());
    let looked = async {
        let current = match usable {
            Some((_, channel)) => channel,
            None => live.connection.create_channel().await?,
        };
        for source in sources {
            if topology::waiting(&current, source).await? > 0 {
                return Ok((true, current));
            }
        }
        Ok::<_, lapin::Error>((false, current))
    };
    match timeout(STEP, looked).await {
        Ok(Ok((found, current))) => {
            *channel = Some((live.generation, current));
            Ok(found)
        }
        // A queue is missing: the slot that asks it will make it again.
        Ok(Err(e)) if e.is_amqp_soft_error() => Ok(true),
        Ok(Err(e)) => Err(QueueError::Unavailable(e.to_string())),
        Err(_) => Err(QueueError::Unavailable(format!("no answer in {STEP:?}"))),
    }
}

//! Sorts what others publish by its priority.
//!
//! A gateway of ours sends each job to the queue of its priority. Other programs publish to the job
//! queue's name alone, as they are told to, so that their jobs of all priorities wait in the plain
//! queue, in the order in which they came. A broker's queue cannot be looked through, only taken from
//! its head; so what waits there is taken out and sent on to its band, before a slot takes a job.
//!
//! When: a slot that finds such a message in the plain queue with others behind it sends it to its band,
//! and makes the band of the plain priority. That band is the mark, for all workers and as long as the
//! queue lives, that others publish here; from then on a pass comes before each job that is taken, and
//! does what there is to do, at most [`PASS`] messages of it. Our gateways' messages among the others go
//! to the plain priority's band too, since nothing behind them could be reached otherwise, and in their
//! order. Where nothing else waits there is nothing to sort, and the message is run as it is.
//!
//! How: a copy is published and confirmed, then the message is acknowledged. A crash between the two
//! leaves both, which are one job by its id. No message is moved twice: what is in a band is sorted.
//!
//! One pass at a time in a process, so that no slot takes a lesser job while another has the better
//! one in hand. Workers elsewhere may sort the same queue at the same time; then the order of what they
//! have in hand at that moment is not defined.

use futures::future::join_all;
use lapin::Channel;
use tokio_util::sync::CancellationToken;

use super::admit::{self, Seen};
use super::core::{Core, ack};
use super::message::Parcel;
use super::slot::get;
use super::topology::{PLAIN_PRIORITY, Source};
use crate::QueueError;

/// The most messages of one queue that one pass moves.
const PASS: usize = 1000;
/// Messages that are in hand at one time. Should the worker be killed just then, they count as delivered.
const AT_ONCE: usize = 16;

/// Sorts the plain queues of those to which others publish.
///
/// # Errors
/// [`QueueError::Closed`] if `gone`, or that the channel failed; what was in hand goes back with it.
pub(super) async fn pass(
    core: &Core,
    channel: &Channel,
    queues: &[String],
    slot: u64,
    gone: &CancellationToken,
) -> Result<(), QueueError> {
    let marked: Vec<Source> =
        queues.iter().filter(|queue| core.is_marked(queue)).map(|queue| Source::plain(queue)).collect();
    if marked.is_empty() {
        return Ok(());
    }
    let Some(_alone) = gone.run_until_cancelled(core.sorting.lock()).await else {
        return Err(QueueError::Closed);
    };
    for source in &marked {
        for _ in 0..PASS / AT_ONCE {
            let mut batch = Vec::new();
            if let Err(e) = take(channel, source, slot, &mut batch).await {
                // They go back with the channel.
                core.note_untried(&batch).await;
                return Err(e);
            }
            let full = batch.len() == AT_ONCE;
            core.sort(batch, gone).await?;
            if !full {
                break;
            }
        }
    }
    Ok(())
}

/// The next messages of a queue, into `batch`.
async fn take(
    channel: &Channel,
    source: &Source,
    slot: u64,
    batch: &mut Vec<Parcel>,
) -> Result<(), QueueError> {
    while batch.len() < AT_ONCE {
        let Some(parcel) = get(channel, source, slot).await? else { break };
        batch.push(parcel);
    }
    Ok(())
}

impl Core {
    /// Whether others publish to this queue, as far as is known here.
    fn is_marked(&self, queue: &str) -> bool {
        self.bands.borrow().get(queue).is_some_and(|bands| bands.contains(&PLAIN_PRIORITY))
    }

    /// Notes, for everybody, that others publish to this queue.
    pub(super) async fn mark(&self, queue: &str) -> Result<(), QueueError> {
        self.ensure(&Source { queue: queue.to_owned(), band: Some(PLAIN_PRIORITY) }).await
    }

    /// Sends messages on to their bands, in their order.
    async fn sort(&self, batch: Vec<Parcel>, gone: &CancellationToken) -> Result<(), QueueError> {
        let (mut moves, mut outcome) = (Vec::new(), Ok(()));
        for parcel in batch {
            match admit::read(&parcel) {
                Seen::Job { spec, .. } => {
                    let to = Source { queue: spec.queue.clone(), band: Some(spec.priority) };
                    moves.push((parcel.moved_to(&to, spec.id), to, parcel));
                }
                Seen::Wrong { id, why } => match self.refuse(parcel, id, &why, gone).await {
                    Ok(done) => {
                        for parcel in done {
                            ack(&parcel).await;
                        }
                    }
                    Err(e) => outcome = Err(e),
                },
            }
        }
        // First, so that of the messages below none overtakes another that waits for its queue. An error
        // is met again there.
        for (_, to, _) in &moves {
            let _ = self.insist(gone, || self.ensure(to)).await;
        }
        let published = moves.iter().map(|(copy, to, _)| self.insist(gone, || self.publish_job(copy, to)));
        let published = join_all(published).await;
        let mut left = Vec::new();
        for (published, (_, _, parcel)) in published.into_iter().zip(moves) {
            match published {
                Ok(()) => ack(&parcel).await,
                Err(e) => {
                    left.push(parcel);
                    outcome = Err(e);
                }
            }
        }
        self.note_untried(&left).await;
        outcome
    }

    /// Notes of messages that go back that their jobs were not tried.
    async fn note_untried(&self, parcels: &[Parcel]) {
        for id in parcels.iter().filter_map(|parcel| admit::id_of(&parcel.delivery)) {
            if let Err(e) = self.records.note_unspent(id).await {
                tracing::warn!(job = %id, error = %e, "a job that was not tried has lost an attempt");
            }
        }
    }
}

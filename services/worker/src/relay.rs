//! Passes on what is heard of a running job, as events on the queue.
//!
//! The engine's task only drops what it hears into a short channel; a task of the relay's own
//! numbers it, joins neighbouring pieces of output, and publishes it in order. A channel that is full
//! loses the piece: events are best effort, the result has the output.

use std::sync::Arc;
use std::time::Duration;

use hutch_proto::{Event, EventKind, JobId, OutputChunk, Timestamp, Usage};
use hutch_queue::Queue;
use hutch_sandbox::{Observer, Stream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// How many pieces may wait to be published.
const WAITING: usize = 512;
/// Neighbouring pieces are joined up to this size.
const JOINED: usize = 64 << 10;
/// How long the end of a job waits for its last events.
const FLUSH: Duration = Duration::from_secs(2);

/// One thing that was heard.
enum Heard {
    Started,
    Output { step: String, stream: Stream, bytes: Vec<u8> },
    Usage(Usage),
}

/// Whose events these are.
#[derive(Debug, Clone)]
pub(crate) struct Speaker {
    pub(crate) id: JobId,
    pub(crate) attempt: u32,
    pub(crate) worker: String,
}

/// The ear of one attempt.
pub(crate) struct Relay {
    sender: mpsc::Sender<Heard>,
    publisher: JoinHandle<()>,
}

impl Relay {
    /// A relay to this queue. Call it on the runtime.
    pub(crate) fn start(queue: Arc<dyn Queue>, speaker: Speaker) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        let publisher = Publisher { queue, speaker, seq: 0, cut: None };
        Self { sender, publisher: tokio::spawn(publisher.run(receiver)) }
    }

    /// Lets the last events out.
    pub(crate) async fn close(self) {
        drop(self.sender);
        let stop = self.publisher.abort_handle();
        if tokio::time::timeout(FLUSH, self.publisher).await.is_err() {
            stop.abort();
        }
    }

    fn hear(&self, heard: Heard) {
        if self.sender.try_send(heard).is_err() {
            tracing::debug!("an event was lost: the queue takes them too slowly");
        }
    }
}

impl Observer for Relay {
    fn started(&self) {
        self.hear(Heard::Started);
    }

    fn output(&self, step: &str, stream: Stream, bytes: &[u8]) {
        for piece in bytes.chunks(JOINED) {
            self.hear(Heard::Output { step: step.to_owned(), stream, bytes: piece.to_vec() });
        }
    }

    fn usage(&self, usage: &Usage) {
        self.hear(Heard::Usage(*usage));
    }
}

/// The beginning of a character whose rest has not come yet.
struct Cut {
    step: String,
    stream: Stream,
    bytes: Vec<u8>,
}

struct Publisher {
    queue: Arc<dyn Queue>,
    speaker: Speaker,
    seq: u64,
    cut: Option<Cut>,
}

impl Publisher {
    async fn run(mut self, mut receiver: mpsc::Receiver<Heard>) {
        let mut next = receiver.recv().await;
        while let Some(heard) = next {
            next = None;
            match heard {
                Heard::Started => {
                    let worker = self.speaker.worker.clone();
                    self.publish(EventKind::Started { worker }).await;
                }
                Heard::Usage(usage) => self.publish(EventKind::Usage { usage }).await,
                Heard::Output { step, stream, mut bytes } => {
                    next = join(&mut receiver, &step, stream, &mut bytes);
                    self.output(step, stream, bytes).await;
                }
            }
            if next.is_none() {
                next = receiver.recv().await;
            }
        }
        self.end_cut().await;
    }

    /// Publishes output, holding back the beginning of a character that was cut in two.
    async fn output(&mut self, step: String, stream: Stream, mut bytes: Vec<u8>) {
        match self.cut.take() {
            Some(mut cut) if cut.stream == stream && cut.step == step => {
                cut.bytes.append(&mut bytes);
                bytes = cut.bytes;
            }
            other => {
                self.cut = other;
                self.end_cut().await;
            }
        }
        let whole = whole_characters(&bytes);
        let rest = bytes.split_off(whole);
        if !bytes.is_empty() {
            self.publish_output(&step, stream, &bytes).await;
        }
        if !rest.is_empty() {
            self.cut = Some(Cut { step, stream, bytes: rest });
        }
    }

    async fn end_cut(&mut self) {
        if let Some(cut) = self.cut.take() {
            self.publish_output(&cut.step, cut.stream, &cut.bytes).await;
        }
    }

    async fn publish_output(&mut self, step: &str, stream: Stream, bytes: &[u8]) {
        let chunk = OutputChunk::new(step, bytes);
        let kind = match stream {
            Stream::Stdout => EventKind::Stdout(chunk),
            Stream::Stderr => EventKind::Stderr(chunk),
        };
        self.publish(kind).await;
    }

    async fn publish(&mut self, kind: EventKind) {
        self.seq += 1;
        let Speaker { id, attempt, .. } = self.speaker;
        self.queue.publish(Event { id, attempt, seq: self.seq, at: Timestamp::now(), kind }).await;
    }
}

/// Adds what waits already of the same output; returns the first thing that is something else.
fn join(
    receiver: &mut mpsc::Receiver<Heard>,
    step: &str,
    stream: Stream,
    bytes: &mut Vec<u8>,
) -> Option<Heard> {
    while bytes.len() < JOINED {
        match receiver.try_recv() {
            Ok(Heard::Output { step: other, stream: same, bytes: mut more })
                if other == step && same == stream =>
            {
                bytes.append(&mut more);
            }
            Ok(other) => return Some(other),
            Err(_) => return None,
        }
    }
    None
}

/// How many bytes can be shown as text without the character that is cut at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    match str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cut_character_is_held_back() {
        assert_eq!(whole_characters("aé".as_bytes()), 3);
        assert_eq!(whole_characters(&"aé".as_bytes()[..2]), 1);
        assert_eq!(whole_characters(&[0xff, b'a']), 2, "not text at all");
        assert_eq!(whole_characters(&[]), 0);
    }
}

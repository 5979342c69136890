//! `GET /v1/jobs/{id}/events`: what happens to a job, as server-sent events.
//!
//! First what is kept of the job, or from `Last-Event-ID` on; then what comes, until the job ends. The
//! id of an event is its attempt and its number, `1.17`, the same on every gateway. Of a job that
//! ended before anything was kept, the result tells the story.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{self, KeepAlive};
use axum::response::{IntoResponse, Response, Sse};
use futures::StreamExt;
use hutch_proto::{Event, EventKind, JobId, JobResult, OutputChunk};

use crate::Gateway;
use crate::extract::IdInPath;
use crate::hub::Listener;
use crate::jobs::view;
use crate::problem::Problem;

/// How often a silent stream says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How often the queue is asked, since events may be lost.
const ASK: Duration = Duration::from_secs(3);
/// The number of an end that is told to a reader who had the rest elsewhere.
const TOLD_LAST: u64 = u32::MAX as u64;
/// Output of a result is told in pieces of this size.
const PIECE: usize = 64 << 10;

/// `GET /v1/jobs/{id}/events`.
pub(crate) async fn events(
    State(gateway): State<Arc<Gateway>>,
    IdInPath(id): IdInPath,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let seen = last_seen(&headers)?;
    let listener = gateway.hub.listener(id);
    let known = view(&gateway, id).await?;
    let next = seen.and_then(|(attempt, seq)| gateway.hub.index_after(id, attempt, seq)).unwrap_or(0);
    let mut follower = Follower { gateway, id, listener, next, seen, waiting: VecDeque::new(), ended: false };
    if let Some(result) = known.result {
        follower.conclude(&result);
        if follower.waiting.is_empty() {
            // There is nothing more to come: by this a browser knows not to ask again.
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
    }
    let stream = futures::stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((event, follower))
    });
    let stream = stream.map(Ok::<_, Infallible>);
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

/// The attempt and number in `Last-Event-ID`.
fn last_seen(headers: &HeaderMap) -> Result<Option<(u32, u64)>, Problem> {
    let Some(value) = headers.get("last-event-id") else { return Ok(None) };
    let parsed = value
        .to_str()
        .ok()
        .and_then(|text| text.split_once('.'))
        .and_then(|(attempt, seq)| Some((attempt.parse().ok()?, seq.parse().ok()?)));
    parsed.map(Some).ok_or_else(|| {
        Problem::bad_request("`Last-Event-ID`: the id of an event is expected, such as 1.17".to_owned())
    })
}

/// One reader of one job's events.
struct Follower {
    gateway: Arc<Gateway>,
    id: JobId,
    listener: Listener,
    /// The index into what is kept.
    next: u64,
    /// What the reader has had before.
    seen: Option<(u32, u64)>,
    waiting: VecDeque<sse::Event>,
    ended: bool,
}

impl Follower {
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some(event);
            }
            if self.ended || self.gateway.closing.is_cancelled() {
                return None;
            }
            self.read();
            if self.waiting.is_empty() && !self.ended {
                self.wait().await;
            }
        }
    }

    /// Takes what is new in the hub.
    fn read(&mut self) {
        let Some(batch) = self.gateway.hub.read(self.id, self.next) else { return };
        if batch.lost > 0 {
            let comment = format!("{} events are no longer kept", batch.lost);
            self.waiting.push_back(sse::Event::default().comment(comment));
        }
        self.next = batch.next;
        for event in batch.events {
            self.tell(&event);
        }
    }

    /// Waits for news, or until it is time to ask the queue itself.
    async fn wait(&mut self) {
        tokio::select! {
            () = self.gateway.closing.cancelled() => return,
            () = self.listener.changed() => return,
            () = tokio::time::sleep(ASK) => {}
        }
        match self.gateway.ask(self.gateway.queue.get(self.id)).await {
            Ok(Some(known)) => {
                if let Some(result) = known.result {
                    self.conclude(&result);
                }
            }
            Ok(None) => self.ended = true,
            Err(error) => {
                tracing::debug!(id = %self.id, %error, "the queue does not answer a reader of events")
            }
        }
    }

    /// Tells the end of a job whose result is there: what is kept, or else what the result says.
    fn conclude(&mut self, result: &JobResult) {
        self.read();
        // Whoever has read to the end of what is kept has had the end already, now or before.
        self.ended |= self.next > 0 && self.gateway.hub.has_finished(self.id);
        self.ended |= self.seen.is_some_and(|(_, seq)| seq == TOLD_LAST);
        if self.ended {
            return;
        }
        if self.next == 0 && self.seen.is_none() {
            for event in story(result) {
                self.tell(&event);
            }
        } else {
            self.tell(&finished(result, TOLD_LAST));
        }
    }

    fn tell(&mut self, event: &Event) {
        self.ended |= matches!(event.kind, EventKind::Finished { .. });
        match serde_json::to_string(event) {
            Ok(json) => self.waiting.push_back(
                sse::Event::default()
                    .id(format!("{}.{}", event.attempt, event.seq))
                    .event(event.kind.name())
                    .data(json),
            ),
            Err(error) => tracing::warn!(id = %self.id, %error, "an event cannot be shown"),
        }
    }
}

/// What a result says of the events that led to it.
fn story(result: &JobResult) -> Vec<Event> {
    let mut kinds = Vec::new();
    if result.timeline.started_at.is_some() {
        kinds.push(EventKind::Started { worker: result.worker.clone() });
    }
    for step in &result.steps {
        let pieces = |data: &[u8]| -> Vec<OutputChunk> {
            data.chunks(PIECE).map(|piece| OutputChunk::new(&step.name, piece)).collect()
        };
        kinds.extend(pieces(&step.stdout.data).into_iter().map(EventKind::Stdout));
        kinds.extend(pieces(&step.stderr.data).into_iter().map(EventKind::Stderr));
    }
    let mut events: Vec<Event> = kinds
        .into_iter()
        .zip(1..)
        .map(|(kind, seq)| Event {
            id: result.id,
            attempt: result.attempt,
            seq,
            at: result.timeline.started_at.unwrap_or(result.timeline.finished_at),
            kind,
        })
        .collect();
    let seq = events.len() as u64 + 1;
    events.push(finished(result, seq));
    events
}

fn finished(result: &JobResult, seq: u64) -> Event {
    Event {
        id: result.id,
        attempt: result.attempt,
        seq,
        at: result.timeline.finished_at,
        kind: EventKind::Finished { status: result.status, reason: result.reason },
    }
}

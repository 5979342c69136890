//! Follows one job: what it writes goes to this command's own stdout and stderr, until it ends.
//!
//! A stream that breaks off is taken up again where it was, for as long as the gateway comes back.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::StreamExt;
use hutch_proto::{Event, EventKind, JobId, OutputChunk};
use reqwest::{Method, StatusCode};

use super::client::{Client, refusal};
use super::sse::Parser;
use crate::term::Waiting;

/// How often a gateway that is gone is tried again.
const RETRIES: u32 = 30;
/// How long to wait before each try.
const PAUSE: Duration = Duration::from_secs(1);

/// What one stream of events came to.
enum End {
    /// The job has ended.
    Finished,
    /// The reader of stdout has gone away.
    Unheard,
    /// The stream broke off.
    Broken,
}

/// Shows what a job writes until it ends; returns whether anybody still listens.
pub(crate) async fn follow(client: &Client, id: JobId) -> anyhow::Result<bool> {
    let mut follower = Follower { client, id, last: None, attempt: 0, waiting: Waiting::new() };
    let mut failures = 0;
    loop {
        let before = follower.last.clone();
        match follower.stream().await {
            Ok(End::Finished) => return Ok(true),
            Ok(End::Unheard) => return Ok(false),
            Ok(End::Broken) => {}
            Err(error) if failures == 0 && follower.last.is_none() => return Err(error),
            Err(error) if failures >= RETRIES => return Err(error),
            Err(_) => {}
        }
        failures = if follower.last == before { failures + 1 } else { 0 };
        if failures > RETRIES {
            bail!("the gateway breaks every stream off");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

struct Follower<'a> {
    client: &'a Client,
    id: JobId,
    /// The id of the last event.
    last: Option<String>,
    attempt: u32,
    waiting: Waiting,
}

impl Follower<'_> {
    async fn stream(&mut self) -> anyhow::Result<End> {
        let path = format!("/v1/jobs/{}/events", self.id);
        let headers: Vec<(&str, &str)> = self.last.iter().map(|id| ("last-event-id", id.as_str())).collect();
        let answer = self.client.send(Method::GET, &path, None, &headers).await?;
        if answer.status() == StatusCode::NO_CONTENT {
            return Ok(End::Finished);
        }
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        let mut parser = Parser::default();
        let mut pieces = answer.bytes_stream();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            let piece = tokio::select! {
                piece = pieces.next() => piece,
                _ = tick.tick() => {
                    if self.attempt == 0 {
                        self.waiting.show("waiting for a worker");
                    }
                    continue;
                }
            };
            let Some(Ok(piece)) = piece else { return Ok(End::Broken) };
            for message in parser.feed(&piece).context("the gateway's events are not understood")? {
                let event: Event =
                    serde_json::from_str(&message.data).context("the gateway's events are not understood")?;
                if message.id.is_some() {
                    self.last = message.id;
                }
                if let Some(end) = self.hear(&event) {
                    return Ok(end);
                }
            }
        }
    }

    fn hear(&mut self, event: &Event) -> Option<End> {
        self.waiting.clear();
        let again = self.attempt != 0 && event.attempt > self.attempt;
        if again && matches!(event.kind, EventKind::Started { .. }) {
            crate::term::note(format!("attempt {}: what follows is from the beginning", event.attempt));
        }
        self.attempt = self.attempt.max(event.attempt);
        let written = match &event.kind {
            EventKind::Stdout(chunk) => print(io::stdout().lock(), chunk),
            EventKind::Stderr(chunk) => print(io::stderr().lock(), chunk),
            EventKind::Finished { .. } => return Some(End::Finished),
            EventKind::Started { .. } | EventKind::Usage { .. } => Ok(()),
        };
        written.err().map(|_| End::Unheard)
    }
}

fn print(mut out: impl Write, chunk: &OutputChunk) -> io::Result<()> {
    out.write_all(&chunk.bytes())?;
    out.flush()
}

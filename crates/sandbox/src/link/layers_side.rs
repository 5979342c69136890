//! Layers on the engine's side: a worker brings their bytes, this process unpacks them, since their files have owners of
//! every kind. What a layer may have is in the engine's config; what it is, its digest says.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use hutch_proto::Digest;
use hutch_trees::{CappedTrees, Trees as _, UnpackError};
use tokio::runtime::Runtime;

use super::engine_side::Outbox;
use super::message::{AskLayers, Tell, TellLayers};
use super::wire::Message;

/// The most that is asked at one time.
const MOST_UNDERWAY: usize = 64;
/// The most bytes of an error that are told.
const MOST_WORDS: usize = 4096;

/// Answers about layers.
pub(super) struct LayersSide {
    trees: Option<CappedTrees>,
    outbox: Outbox,
    underway: Arc<AtomicUsize>,
}

impl LayersSide {
    pub(super) fn new(trees: Option<&CappedTrees>, outbox: Outbox) -> Self {
        Self { trees: trees.cloned(), outbox, underway: Arc::default() }
    }

    /// Does what is asked on a thread that may wait for a disk.
    pub(super) fn perform(&self, ticket: u64, ask: AskLayers, fds: Vec<OwnedFd>, runtime: &Runtime) {
        if self.underway.fetch_add(1, Ordering::Relaxed) >= MOST_UNDERWAY {
            self.underway.fetch_sub(1, Ordering::Relaxed);
            let tell =
                TellLayers::Failed(true, "the engine is asked for too many layers at one time".to_owned());
            self.outbox.event(Message::of(Tell::Layers { ticket, tell }));
            return;
        }
        let (trees, outbox, underway) = (self.trees.clone(), self.outbox.clone(), Arc::clone(&self.underway));
        runtime.spawn_blocking(move || {
            let tell = match &trees {
                Some(trees) => answer(trees, ask, fds).unwrap_or_else(|error| failed(&error)),
                None => TellLayers::Failed(false, "jobs can stack no stored layers here".to_owned()),
            };
            outbox.answer(Message::of(Tell::Layers { ticket, tell }), underway);
        });
    }
}

fn failed(error: &UnpackError) -> TellLayers {
    let words: String = error.to_string().chars().take(MOST_WORDS).collect();
    TellLayers::Failed(error.is_transient(), words)
}

fn answer(trees: &CappedTrees, ask: AskLayers, fds: Vec<OwnedFd>) -> Result<TellLayers, UnpackError> {
    Ok(match ask {
        AskLayers::Facts(hex) => TellLayers::Facts(trees.facts(&digest(&hex)?).map(Into::into)),
        AskLayers::Touch(hex) => {
            trees.touch(&digest(&hex)?);
            TellLayers::Noted
        }
        AskLayers::Add(hex) => {
            let expected = hex.map(|hex| digest(&hex)).transpose()?;
            let file = fds.into_iter().next().map(File::from).ok_or_else(|| wrong("no bytes came along"))?;
            // Of a pipe or a socket nobody knows whether more will come.
            if !file.metadata().is_ok_and(|meta| meta.is_file()) {
                return Err(wrong("its bytes are no file"));
            }
            let (diff_id, facts) = trees.add(expected.as_ref(), file)?;
            TellLayers::Added(diff_id.hex().to_owned(), facts.into())
        }
        AskLayers::List => {
            let seconds =
                |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
            let all = trees.list()?.into_iter();
            TellLayers::List(
                all.map(|(id, facts, at)| (id.hex().to_owned(), facts.into(), seconds(at))).collect(),
            )
        }
    })
}

fn digest(hex: &str) -> Result<Digest, UnpackError> {
    format!("sha256:{hex}").parse().map_err(|_| wrong("no digest"))
}

fn wrong(what: &str) -> UnpackError {
    UnpackError::Told(format!("not a layer: {what}"))
}

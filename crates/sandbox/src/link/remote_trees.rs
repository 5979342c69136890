//! Layers on the worker's side: the engine has them, and unpacks what this side brings.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hutch_proto::Digest;
use hutch_trees::{LayerFacts, Listed, Trees, UnpackError};

use super::message::{Ask, AskLayers, TellLayers};
use super::wire::Message;
use super::worker_side::{Answer, RemoteEngine};

/// How long the engine may look for a layer.
const LOOK: Duration = Duration::from_secs(10);

/// The layers of an engine in another process.
#[derive(Debug)]
pub(super) struct RemoteTrees(pub(super) Arc<RemoteEngine>);

impl RemoteTrees {
    fn ask(
        &self,
        ask: AskLayers,
        blob: Option<File>,
        patience: Option<Duration>,
    ) -> Result<TellLayers, UnpackError> {
        let message = |ticket| Message {
            fds: blob.into_iter().map(Into::into).collect(),
            ..Message::of(Ask::Layers { ticket, ask })
        };
        match self.0.answer_to(message, patience) {
            Some(Answer::Layers(TellLayers::Failed(false, why))) => Err(UnpackError::Told(why)),
            Some(Answer::Layers(TellLayers::Failed(true, why))) => Err(host(why)),
            Some(Answer::Layers(tell)) => Ok(tell),
            _ => Err(host("the engine does not answer".to_owned())),
        }
    }
}

fn host(why: String) -> UnpackError {
    UnpackError::Host { operation: "have a layer unpacked".to_owned(), source: io::Error::other(why) }
}

fn strange() -> UnpackError {
    host("the engine answers something else".to_owned())
}

fn digest(hex: &str) -> Result<Digest, UnpackError> {
    format!("sha256:{hex}").parse().map_err(|_| strange())
}

impl Trees for RemoteTrees {
    fn facts(&self, diff_id: &Digest) -> Option<LayerFacts> {
        match self.ask(AskLayers::Facts(diff_id.hex().to_owned()), None, Some(LOOK)) {
            Ok(TellLayers::Facts(facts)) => facts.map(Into::into),
            _ => None,
        }
    }

    fn touch(&self, diff_id: &Digest) {
        // A layer whose last use is not noted may go earlier, no more.
        let _ = self.ask(AskLayers::Touch(diff_id.hex().to_owned()), None, Some(LOOK));
    }

    fn add(&self, expected: Option<&Digest>, blob: File) -> Result<(Digest, LayerFacts), UnpackError> {
        let expected = expected.map(|digest| digest.hex().to_owned());
        match self.ask(AskLayers::Add(expected), Some(blob), None)? {
            TellLayers::Added(hex, facts) => Ok((digest(&hex)?, facts.into())),
            _ => Err(strange()),
        }
    }

    fn list(&self) -> Result<Vec<Listed>, UnpackError> {
        let TellLayers::List(all) = self.ask(AskLayers::List, None, Some(LOOK))? else {
            return Err(strange());
        };
        let listed = |(hex, facts, at): (String, super::message::WireFacts, u64)| {
            Ok((digest(&hex)?, facts.into(), SystemTime::UNIX_EPOCH + Duration::from_secs(at)))
        };
        all.into_iter().map(listed).collect()
    }
}

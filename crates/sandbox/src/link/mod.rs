//! The engine in a process of its own, with privileges and without a network; the worker beside it, the other way round.
//!
//! 1. [`EngineProcess::fork`], while there is one thread: the child forks the launcher, makes an engine by this config, and
//!    says that it is ready. What a worker asks later cannot change the config.
//! 2. [`EngineProcess::connect`], when the worker has given up its privileges: an [`EngineHandle`], as for an engine here.
//! 3. Over the link goes what `message` lists, on the wire as `wire` says; `engine_side` trusts none of it.

mod engine_side;
mod exec_side;
mod handle;
mod layers_side;
mod message;
mod remote_exec;
mod remote_trees;
mod wire;
mod worker_side;

use std::os::fd::OwnedFd;

use hutch_sandbox_sys::PacketSocket;
use hutch_sandbox_sys::separate::{Privileged, fork_privileged};

pub use handle::EngineHandle;
pub use worker_side::TakeDown;

use crate::config::EngineConfig;
use crate::engine::{Engine, EngineError, Launcher};
use message::{TELL_FDS, Tell};
use wire::{MAX_PACKET, Message};
use worker_side::{MOST_TOLD, RemoteEngine};

/// What a message may have beside the contents of a job.
const ROOM: u64 = 32 << 20;

/// An engine in a process of its own that is ready for jobs.
#[derive(Debug)]
pub struct EngineProcess {
    socket: PacketSocket,
    process: Privileged,
    reaped: u64,
}

impl EngineProcess {
    /// Forks it. Call it while this process has one thread. `max_input_bytes` is how much the contents of one job may have;
    /// `begin` is called in the new process, for its logs.
    ///
    /// # Errors
    /// If no job could be isolated here; the message names the remedy.
    pub fn fork(
        config: EngineConfig,
        max_input_bytes: u64,
        begin: impl FnOnce(),
    ) -> Result<Self, EngineError> {
        let most = max_input_bytes.saturating_add(ROOM);
        let live = |socket, network| {
            begin();
            live(socket, network, config, most)
        };
        let (socket, process) = fork_privileged(live)
            .map_err(|e| EngineError(format!("cannot fork the engine's process: {}", e.desc())))?;
        let mut packet = vec![0; MAX_PACKET];
        let refused = match wire::receive::<Tell, TELL_FDS>(&socket, &mut packet, MOST_TOLD) {
            Ok(Some(Message { what: Tell::Ready { reaped }, .. })) => {
                return Ok(Self { socket, process, reaped });
            }
            Ok(Some(Message { what: Tell::Refused, mut parts, .. })) => {
                String::from_utf8_lossy(&parts.pop().unwrap_or_default()).into_owned()
            }
            Ok(_) => "the engine's process ended before it was ready".to_owned(),
            Err(error) => format!("the engine's process: {error}"),
        };
        socket.close();
        process.wait();
        Err(EngineError(refused))
    }

    /// A handle on it; from now on this process has another thread. When the last handle is dropped, the engine ends, and
    /// every sandbox with it.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn connect(self) -> Result<EngineHandle, EngineError> {
        let Self { socket, process, reaped } = self;
        RemoteEngine::start(socket, process, reaped)
            .map(EngineHandle::remote)
            .map_err(|e| EngineError(format!("cannot start a thread for the engine's link: {e}")))
    }
}

/// The life of the engine's process; returns its exit code.
fn live(socket: PacketSocket, network: OwnedFd, config: EngineConfig, most: u64) -> i32 {
    let begun = Launcher::fork().and_then(|launcher| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.map_err(|e| EngineError(format!("cannot start the engine's runtime: {e}")))?;
        Ok((Engine::beside_a_network(launcher, config, Some(network))?, runtime))
    });
    let (engine, runtime) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            let parts = vec![error.to_string().into_bytes()];
            let _ = wire::send(&socket, &Message { parts, ..Message::of(Tell::Refused) });
            return 1;
        }
    };
    let ready = Message::of(Tell::Ready { reaped: engine.reaped() });
    if wire::send(&socket, &ready).is_ok() {
        engine_side::serve(socket, engine, &runtime, most);
    }
    0
}

#[cfg(test)]
mod tests;

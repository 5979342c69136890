//! Ctrl-C and SIGTERM.

use hutch_worker::Drain;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Waits for the next signal to end.
async fn next(signals: &mut [Option<Signal>; 2]) {
    let [interrupt, terminate] = signals;
    tokio::select! {
        () = heard(interrupt) => {}
        () = heard(terminate) => {}
    }
}

async fn heard(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

fn listen() -> [Option<Signal>; 2] {
    [SignalKind::interrupt(), SignalKind::terminate()].map(|kind| {
        signal(kind).inspect_err(|error| tracing::warn!(%error, "a signal cannot be listened to")).ok()
    })
}

/// Cancels when this process is told to end; completes when it is told so again. Listens from now on.
pub(crate) fn cancel_on_end(cancel: CancellationToken) -> JoinHandle<()> {
    let mut signals = listen();
    tokio::spawn(async move {
        next(&mut signals).await;
        cancel.cancel();
        next(&mut signals).await;
    })
}

/// Drains a worker when this process is told to end, and hurries it the second time.
pub(crate) fn drain_on_end(drain: Drain) -> JoinHandle<()> {
    let mut signals = listen();
    tokio::spawn(async move {
        loop {
            next(&mut signals).await;
            drain.signal();
        }
    })
}

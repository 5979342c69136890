//! `GET /v1/jobs/{id}/exec`: one more program in a running job, over a WebSocket (RFC 6455).
//!
//! The job is looked up and its worker called before the connection changes its protocol, so that whoever cannot be served
//! is told so in HTTP. Then messages go both ways as they are: see [`hutch_proto::ExecMessage`]. A text message stands for
//! a word. The gateway reads none of them; the worker, who has to, trusts none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use hutch_proto::{JobState, MAX_EXEC_START_BYTES};
use hutch_queue::Call;
use tokio::sync::mpsc::{Receiver, Sender};

use crate::Gateway;
use crate::auth::MayRead;
use crate::extract::IdInPath;
use crate::jobs::view;
use crate::problem::Problem;

/// How often a caller is asked whether it is there.
const PING: Duration = Duration::from_secs(20);

/// `GET /v1/jobs/{id}/exec`.
///
/// Who is in a job sees all of it, so this needs both scopes.
pub(crate) async fn exec(
    State(gateway): State<Arc<Gateway>>,
    Extension(MayRead(may_read)): Extension<MayRead>,
    IdInPath(id): IdInPath,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    if !may_read {
        return Err(Problem::forbidden("this needs a token with both submit and read".to_owned()));
    }
    match view(&gateway, id).await?.state {
        JobState::Running => {}
        JobState::Queued => return Err(Problem::conflict(format!("job {id} waits: it does not run yet"))),
        JobState::Finished => return Err(Problem::conflict(format!("job {id} has finished"))),
    }
    let upgrade = upgrade.map_err(|error| {
        Problem::bad_request(format!("{}; a WebSocket is expected here", error.body_text()))
    })?;
    let nobody = || Problem::conflict(format!("job {id} is run by no worker that can be reached now"));
    let call = gateway.ask(gateway.queue.call(id)).await?.ok_or_else(nobody)?;
    let upgrade = upgrade.max_message_size(1 + MAX_EXEC_START_BYTES).max_frame_size(1 + MAX_EXEC_START_BYTES);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let closing = gateway.closing.clone();
        if closing.run_until_cancelled(carry(socket, call)).await.is_none() {
            tracing::info!(job = %id, "a call was cut: the gateway ends");
        }
    }))
}

/// Carries messages both ways until one side has hung up.
async fn carry(socket: WebSocket, Call { to, from }: Call) {
    let (sink, stream) = socket.split();
    let alive = AtomicBool::new(true);
    tokio::select! {
        () = tell(sink, from, &alive) => {}
        () = listen(stream, to, &alive) => {}
    }
}

/// Tells the caller what the worker says, until that is all; asks now and then whether the caller is there.
async fn tell(mut sink: SplitSink<WebSocket, Message>, mut from: Receiver<Vec<u8>>, alive: &AtomicBool) {
    let mut ping = tokio::time::interval(PING);
    loop {
        let message = tokio::select! {
            said = from.recv() => match said {
                Some(bytes) => Message::Binary(bytes.into()),
                None => break,
            },
            _ = ping.tick() => {
                if !alive.swap(false, Ordering::Relaxed) {
                    return;
                }
                Message::Ping(Bytes::new())
            }
        };
        if sink.send(message).await.is_err() {
            return;
        }
    }
    // The caller may have hung up already.
    let _ = sink.send(Message::Close(Some(CloseFrame { code: close_code::NORMAL, reason: "".into() }))).await;
}

/// Tells the worker what the caller says, until that hangs up.
async fn listen(mut stream: SplitStream<WebSocket>, to: Sender<Vec<u8>>, alive: &AtomicBool) {
    while let Some(Ok(message)) = stream.next().await {
        alive.store(true, Ordering::Relaxed);
        let bytes = match message {
            Message::Binary(bytes) => bytes.to_vec(),
            Message::Text(word) => [&[3], word.as_bytes()].concat(),
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Close(_) => return,
        };
        // A worker that listens no more may still have something to say.
        let _ = to.send(bytes).await;
    }
}

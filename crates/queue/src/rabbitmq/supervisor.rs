//! One connection to the broker, kept up.
//!
//! In order, for ever: connect, prepare (declare what this connection needs), tell who waits that
//! there is a connection, watch it; when it is lost, tell that, wait a little longer each time with
//! jitter, and begin anew. lapin's own recovery is off: what must be redeclared, and what becomes of
//! a job in hand, is known here and not there.
//!
//! Two of these make a queue: one that publishes and one that only consumes, since a broker in an
//! alarm stops reading from connections that publish, and acknowledgements must still get through.
//!
//! Loss is noticed by the socket's end, by a channel of events, or, on a network that swallows
//! everything, by heartbeats: with one in 10 s lapin gives up after 20 s of silence.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties, ErrorKind};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::QueueError;

/// Seconds between heartbeats, where the URL does not say otherwise.
const HEARTBEAT_S: u16 = 10;
/// Longest wait for a connection, and for a round trip on it.
pub(super) const STEP: Duration = Duration::from_secs(10);
/// How often a connection's state is looked at, beside its events.
const LOOK: Duration = Duration::from_secs(1);

/// A connection that is up.
#[derive(Clone)]
pub(super) struct Live {
    /// Counts the connections of one link.
    pub(super) generation: u64,
    pub(super) connection: Arc<Connection>,
}

#[derive(Clone)]
enum State {
    /// Not there, and why; whether trying again can help.
    Down {
        why: String,
        hopeless: bool,
    },
    Up(Live),
    Closed,
}

/// What a new connection needs before anybody uses it.
pub(super) type Prepare =
    Arc<dyn for<'a> Fn(&'a Connection) -> BoxFuture<'a, Result<(), lapin::Error>> + Send + Sync>;

/// A connection that is kept up; clones share it.
#[derive(Clone)]
pub(super) struct Link {
    state: watch::Receiver<State>,
}

impl Link {
    /// Begins to keep up a connection, until `closing`.
    pub(super) fn start(
        uri: AMQPUri,
        name: String,
        prepare: Prepare,
        reconnects: Arc<AtomicU64>,
        closing: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let down = State::Down { why: "not connected yet".to_owned(), hopeless: false };
        let (sender, state) = watch::channel(down);
        let keeper = Keeper { uri, name, prepare, reconnects, closing, sender, generation: 0 };
        (Self { state }, keeper.run())
    }

    /// The connection, once there is one.
    pub(super) async fn live(&self) -> Result<Live, QueueError> {
        let mut state = self.state.clone();
        let found = state.wait_for(|state| !matches!(state, State::Down { .. })).await;
        match found.as_deref() {
            Ok(State::Up(live)) => Ok(live.clone()),
            _ => Err(QueueError::Closed),
        }
    }

    /// The connection that there is now.
    pub(super) fn now(&self) -> Result<Live, QueueError> {
        match &*self.state.borrow() {
            State::Up(live) => Ok(live.clone()),
            State::Down { why, .. } => Err(QueueError::Unavailable(why.clone())),
            State::Closed => Err(QueueError::Closed),
        }
    }

    /// Waits for the first connection.
    ///
    /// # Errors
    /// [`QueueError::Setup`] where trying again does not help, [`QueueError::Unavailable`] after `patience`.
    pub(super) async fn first(&self, patience: Duration) -> Result<Live, QueueError> {
        let mut state = self.state.clone();
        let decided = state.wait_for(|state| !matches!(state, State::Down { hopeless: false, .. }));
        match timeout(patience, decided).await.as_ref().map(|found| found.as_deref()) {
            Ok(Ok(State::Up(live))) => Ok(live.clone()),
            Ok(Ok(State::Down { why, .. })) => Err(QueueError::Setup(why.clone())),
            Ok(_) => Err(QueueError::Closed),
            Err(_) => self.now(),
        }
    }
}

struct Keeper {
    uri: AMQPUri,
    name: String,
    prepare: Prepare,
    reconnects: Arc<AtomicU64>,
    closing: CancellationToken,
    sender: watch::Sender<State>,
    generation: u64,
}

impl Keeper {
    async fn run(mut self) {
        let closing = self.closing.clone();
        loop {
            let Some(live) = closing.run_until_cancelled(self.connect()).await else { break };
            if live.generation > 1 {
                self.reconnects.fetch_add(1, Ordering::Relaxed);
            }
            tracing::info!(connection = self.name, generation = live.generation, "connected to the broker");
            let lost = watch_over(Arc::clone(&live.connection));
            self.sender.send_replace(State::Up(live.clone()));
            let why = closing.run_until_cancelled(lost).await;
            let Some(why) = why else {
                let _ = timeout(Duration::from_secs(2), live.connection.close(200, "closed".into())).await;
                break;
            };
            tracing::warn!(connection = self.name, why, "lost the broker");
            self.sender.send_replace(State::Down { why, hopeless: false });
        }
        self.sender.send_replace(State::Closed);
    }

    async fn connect(&mut self) -> Live {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(5))
            .without_max_times()
            .with_jitter();
        let mut pauses = pauses.build();
        loop {
            match self.attempt().await {
                Ok(connection) => {
                    self.generation += 1;
                    return Live { generation: self.generation, connection: Arc::new(connection) };
                }
                Err((why, hopeless)) => {
                    tracing::warn!(connection = self.name, why, "cannot use the broker, trying again");
                    self.sender.send_replace(State::Down { why, hopeless });
                }
            }
            tokio::time::sleep(pauses.next().unwrap_or(STEP)).await;
        }
    }

    async fn attempt(&self) -> Result<Connection, (String, bool)> {
        let at = format!("{}:{}", self.uri.authority.host, self.uri.authority.port);
        let properties = ConnectionProperties::default().with_connection_name(self.name.as_str().into());
        let mut uri = self.uri.clone();
        uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
        let connection = match timeout(STEP, Connection::connect_uri(uri, properties)).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(e)) => return Err((format!("connect to the broker at {at}: {e}"), is_hopeless(&e))),
            Err(_) => return Err((format!("connect to the broker at {at}: no answer in {STEP:?}"), false)),
        };
        match timeout(STEP, (self.prepare)(&connection)).await {
            Ok(Ok(())) => Ok(connection),
            Ok(Err(e)) => Err((describe(&e), is_hopeless(&e))),
            Err(_) => Err((format!("declare on the broker at {at}: no answer in {STEP:?}"), false)),
        }
    }
}

/// Completes when the connection is lost, with the reason.
async fn watch_over(connection: Arc<Connection>) -> String {
    // One listener alone: each event goes to only one of several.
    let mut events = Box::pin(connection.events_listener());
    let mut last = "the connection ended".to_owned();
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(lapin::Event::Error(e)) => last = e.to_string(),
                Some(lapin::Event::ConnectionBlocked(why)) => {
                    tracing::warn!(why, "the broker takes no messages now");
                }
                Some(lapin::Event::ConnectionUnblocked) => tracing::info!("the broker takes messages again"),
                Some(_) => {}
                None => tokio::time::sleep(LOOK).await,
            },
            () = tokio::time::sleep(LOOK) => {}
        }
        if !connection.status().connected() {
            return last;
        }
    }
}

/// Whether the same would be refused again.
fn is_hopeless(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(e) => {
            // Access refused, not allowed (no such virtual host), or another topology.
            matches!(e.get_id(), 403 | 406 | 530)
        }
        ErrorKind::InvalidProtocolVersion(_) | ErrorKind::AuthProviderError(_) => true,
        _ => false,
    }
}

/// A refused declaration, with what can be done about it.
pub(super) fn describe(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(e) if e.get_id() == 406 => format!(
            "the broker has this already, but otherwise than hutch needs it: {}; delete it there, or use another virtual host",
            e.get_message()
        ),
        _ => format!("declare on the broker: {error}"),
    }
}

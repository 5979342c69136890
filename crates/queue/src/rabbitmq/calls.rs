//! Calls over the broker: see [`crate::calls`].
//!
//! 1. The caller declares a queue of its own, and publishes `exec.<id>` on the exchange for control, with that queue as
//!    `reply_to`. It expires soon: nobody is called back.
//! 2. The worker that holds the job declares a queue of its own, and answers with its name. All others are silent.
//! 3. Both send what is said to the other's queue, as [`Kind::Data`], at most [`WINDOW`] of them more than the other has
//!    granted by [`Kind::More`]; so a slow side fills no queue. [`Kind::End`] says that there will be no more.
//!
//! Every message is mandatory and confirmed: where the other's queue is gone, so is the other. Who has nothing to say
//! says so now and then.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use hutch_proto::JobId;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::core::Core;
use super::feeds::{consume, late, unavailable};
use super::supervisor::STEP;
use super::topology;
use crate::QueueError;
use crate::calls::{Call, WINDOW, pair};

/// How long a call waits for the worker that holds the job.
const ANSWER: Duration = Duration::from_secs(5);
/// How often each side says that it is there.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// After how much silence the other side is taken for gone.
const SILENCE: Duration = Duration::from_secs(40);
/// The routing keys of calls.
pub(super) const KEY: &str = "exec";

/// What a message between the two sides is: its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Something was said: the rest of the message.
    Data = 0,
    /// So many more may be sent, as four bytes, little-endian; none is a sign of life.
    More = 1,
    /// There will be no more.
    End = 2,
}

/// One side's way to the other.
struct Line {
    /// To say something, on the connection that publishes.
    channel: Channel,
    /// To hear something, on the one that consumes.
    hears: Channel,
    inbox: lapin::Consumer,
    own: ShortString,
}

impl Line {
    /// Opens a queue to be answered in, and a channel to answer by.
    async fn open(core: &Core) -> Result<Self, QueueError> {
        let opened = async {
            let hears = core.consume.now()?.connection.create_channel().await.map_err(|e| unavailable(&e))?;
            let own = topology::declare_private(&hears, topology::CONTROL, &[]).await;
            let own = own.map_err(|e| unavailable(&e))?;
            let inbox = consume(&hears, own.clone(), true).await?;
            let channel =
                core.publish.now()?.connection.create_channel().await.map_err(|e| unavailable(&e))?;
            channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(|e| unavailable(&e))?;
            Ok(Self { channel, hears, inbox, own })
        };
        timeout(STEP, opened).await.map_err(|_| late("open a line"))?
    }

    /// Publishes where it must be taken; false if there is nobody.
    async fn publish(
        &self,
        exchange: &str,
        key: &str,
        properties: BasicProperties,
    ) -> Result<bool, QueueError> {
        say(&self.channel, exchange, key, properties, &[]).await
    }
}

async fn say(
    channel: &Channel,
    exchange: &str,
    key: &str,
    properties: BasicProperties,
    body: &[u8],
) -> Result<bool, QueueError> {
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let said =
        async { channel.basic_publish(exchange.into(), key.into(), options, body, properties).await?.await };
    match timeout(STEP, said).await {
        Ok(Ok(Confirmation::Ack(None))) => Ok(true),
        Ok(Ok(_)) => Ok(false),
        Ok(Err(e)) => Err(unavailable(&e)),
        Err(_) => Err(late("say something")),
    }
}

/// Calls who holds a job; none if nobody says that he does.
pub(super) async fn call(core: &Arc<Core>, id: JobId) -> Result<Option<Call>, QueueError> {
    let mut line = Line::open(core).await?;
    let properties = BasicProperties::default()
        .with_reply_to(line.own.clone())
        .with_message_id(id.to_string().into())
        .with_expiration(ANSWER.as_millis().to_string().into());
    if !line.publish(topology::CONTROL, &format!("{KEY}.{id}"), properties).await? {
        return Ok(None);
    }
    let Ok(Some(answer)) = timeout(ANSWER, line.inbox.next()).await else { return Ok(None) };
    let answer = answer.map_err(|e| unavailable(&e))?;
    let Some(peer) = answer.properties.reply_to().clone() else { return Ok(None) };
    let (ours, theirs) = pair();
    connect(line, peer, theirs);
    Ok(Some(ours))
}

/// Answers a call about a job that this process holds.
pub(super) async fn answer(core: Arc<Core>, id: JobId, caller: ShortString) {
    let answered = async {
        let line = Line::open(&core).await?;
        let Some(call) = core.calls.put_through(id) else { return Ok(()) };
        let properties = BasicProperties::default().with_reply_to(line.own.clone());
        if line.publish("", caller.as_str(), properties).await? {
            connect(line, caller, call);
        }
        Ok::<_, QueueError>(())
    };
    if let Err(error) = answered.await {
        tracing::warn!(job = %id, %error, "a call could not be answered");
    }
}

/// Carries a call over a line until it ends.
fn connect(line: Line, peer: ShortString, Call { to, from }: Call) {
    let Line { channel, hears: other, inbox, .. } = line;
    tokio::spawn(async move {
        let (granted, spoken) = (Semaphore::new(WINDOW), CancellationToken::new());
        let speaks = speak(&channel, &peer, from, &granted, &spoken);
        let hears = hear(&channel, &peer, inbox, to, &granted, &spoken);
        let error = tokio::select! { error = speaks => error, error = hears => error };
        tracing::debug!(%error, "a call ended");
        for channel in [channel, other] {
            let _ = timeout(STEP, channel.close(200, "over".into())).await;
        }
    });
}

/// Sends what is said, as far as the other side has room for it, and signs of life; until the other side is gone.
async fn speak(
    channel: &Channel,
    peer: &ShortString,
    mut from: mpsc::Receiver<Vec<u8>>,
    granted: &Semaphore,
    spoken: &CancellationToken,
) -> QueueError {
    let mut sign = tokio::time::interval(SIGN_OF_LIFE);
    loop {
        let (kind, bytes) = tokio::select! {
            said = next(&mut from, granted), if !spoken.is_cancelled() => match said {
                Some(bytes) => (Kind::Data, bytes),
                None => (Kind::End, Vec::new()),
            },
            _ = sign.tick() => (Kind::More, vec![0; 4]),
        };
        match send(channel, peer, kind, &bytes).await {
            Ok(true) if kind == Kind::End => spoken.cancel(),
            Ok(true) => {}
            Ok(false) => return QueueError::Unavailable("the other side is gone".to_owned()),
            Err(error) => return error,
        }
    }
}

/// The next thing to be said, once the other side has room for it.
async fn next(from: &mut mpsc::Receiver<Vec<u8>>, granted: &Semaphore) -> Option<Vec<u8>> {
    // It is never closed.
    if let Ok(permit) = granted.acquire().await {
        let said = from.recv().await;
        if said.is_some() {
            permit.forget();
        }
        return said;
    }
    None
}

async fn send(channel: &Channel, peer: &ShortString, kind: Kind, bytes: &[u8]) -> Result<bool, QueueError> {
    let body = [&[kind as u8], bytes].concat();
    say(channel, "", peer.as_str(), BasicProperties::default(), &body).await
}

/// Passes on what is heard, and grants more as it is taken; until both sides have said all.
async fn hear(
    channel: &Channel,
    peer: &ShortString,
    mut inbox: lapin::Consumer,
    to: mpsc::Sender<Vec<u8>>,
    granted: &Semaphore,
    spoken: &CancellationToken,
) -> QueueError {
    let over = |why: &str| QueueError::Unavailable(why.to_owned());
    // None once the other side has said all, or nobody listens here any more.
    let mut to = Some(to);
    let mut taken = 0;
    loop {
        let closed = async {
            match &to {
                Some(to) => to.closed().await,
                None => spoken.cancelled().await,
            }
        };
        let heard = tokio::select! {
            heard = timeout(SILENCE, inbox.next()) => heard,
            () = closed => match to.take() {
                Some(_) => continue,
                None => return over("both sides have said all"),
            },
        };
        let Ok(Some(Ok(message))) = heard else { return over("nothing more is heard") };
        match message.data.split_first() {
            Some((0, bytes)) => {
                if let Some(to) = &to {
                    // Nobody may listen any more.
                    let _ = to.send(bytes.to_vec()).await;
                }
                taken += 1;
                if taken as usize * 2 >= WINDOW {
                    if let Err(error) = send(channel, peer, Kind::More, &u32::to_le_bytes(taken)).await {
                        return error;
                    }
                    taken = 0;
                }
            }
            Some((1, more)) => {
                let more = more.try_into().map(u32::from_le_bytes).unwrap_or(0) as usize;
                granted.add_permits(more.min(WINDOW.saturating_sub(granted.available_permits())));
            }
            Some((2, _)) => to = None,
            _ => return over("the other side says what is not understood"),
        }
    }
}

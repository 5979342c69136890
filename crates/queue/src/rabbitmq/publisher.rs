//! Publishing, and knowing that it arrived.
//!
//! One channel with confirms on the publishing connection carries all that must arrive. A message
//! counts as published when the broker confirmed it and did not send it back; all within a time
//! limit, since a broker in an alarm neither refuses nor confirms. What was not confirmed may have
//! arrived all the same: ids make that harmless.
//!
//! Events have a channel of their own without confirms, fed from a short queue that overflows.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::message::Message;
use super::supervisor::{Link, STEP};
use crate::QueueError;

/// Why a message was not published.
#[derive(Debug, thiserror::Error)]
pub(super) enum PublishError {
    /// Nothing is bound that would take it.
    #[error("no queue takes messages to exchange `{exchange}` with key `{key}`: {text}")]
    Unroutable { exchange: &'static str, key: String, text: String },
    /// It cannot be said that it arrived.
    #[error("publish to exchange `{exchange}`: {why}")]
    Unsure { exchange: &'static str, why: String },
    /// The queue is being closed.
    #[error("the queue is closed")]
    Closed,
}

impl From<PublishError> for QueueError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Closed => Self::Closed,
            other => Self::Unavailable(other.to_string()),
        }
    }
}

/// The one channel that publishes with confirms.
pub(super) struct Publisher {
    link: Link,
    limit: Duration,
    channel: Mutex<Option<(u64, Channel)>>,
}

impl Publisher {
    pub(super) fn new(link: Link, limit: Duration) -> Self {
        Self { link, limit, channel: Mutex::new(None) }
    }

    /// Publishes to where it must be taken.
    pub(super) async fn publish(&self, message: &Message) -> Result<(), PublishError> {
        self.send(message, true).await
    }

    /// Publishes to whoever listens, be it nobody.
    pub(super) async fn broadcast(&self, message: &Message) -> Result<(), PublishError> {
        self.send(message, false).await
    }

    async fn send(&self, message: &Message, mandatory: bool) -> Result<(), PublishError> {
        let exchange = message.exchange;
        let unsure = |why: String| PublishError::Unsure { exchange, why };
        let confirmation = async {
            let channel = self.channel().await?;
            let options = BasicPublishOptions { mandatory, immediate: false };
            let confirm = channel
                .basic_publish(
                    exchange.into(),
                    message.key.clone(),
                    options,
                    &message.body,
                    message.properties.clone(),
                )
                .await
                .map_err(|e| unsure(e.to_string()))?;
            confirm.await.map_err(|e| unsure(e.to_string()))
        };
        match timeout(self.limit, confirmation).await {
            Err(_) => Err(unsure(format!("not confirmed in {:?}", self.limit))),
            Ok(Err(e)) => Err(e),
            Ok(Ok(Confirmation::Ack(None))) => Ok(()),
            Ok(Ok(Confirmation::Ack(Some(returned)))) => Err(PublishError::Unroutable {
                exchange,
                key: message.key.to_string(),
                text: returned.reply_text.to_string(),
            }),
            Ok(Ok(Confirmation::Nack(_))) => Err(unsure("refused by the broker".to_owned())),
            Ok(Ok(Confirmation::NotRequested)) => Err(unsure("the channel does not confirm".to_owned())),
        }
    }

    async fn channel(&self) -> Result<Channel, PublishError> {
        let live = match self.link.now() {
            Ok(live) => live,
            Err(QueueError::Closed) => return Err(PublishError::Closed),
            Err(e) => return Err(PublishError::Unsure { exchange: "", why: e.to_string() }),
        };
        let mut slot = self.channel.lock().await;
        if let Some((generation, channel)) = &*slot
            && *generation == live.generation
            && channel.status().connected()
        {
            return Ok(channel.clone());
        }
        let made = async {
            let channel = live.connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok::<_, lapin::Error>(channel)
        };
        let channel = made
            .await
            .map_err(|e| PublishError::Unsure { exchange: "", why: format!("open a channel: {e}") })?;
        *slot = Some((live.generation, channel.clone()));
        Ok(channel)
    }
}

/// Publishes events one after another; when the queue closes, what waits by then.
pub(super) async fn publish_events(
    link: Link,
    mut events: mpsc::Receiver<Message>,
    closing: CancellationToken,
) {
    let mut channel: Option<(u64, Channel)> = None;
    loop {
        let next = match closing.run_until_cancelled(events.recv()).await {
            Some(next) => next,
            None => events.try_recv().ok(),
        };
        let Some(message) = next else { return };
        let Ok(live) = link.now() else { continue };
        let usable = channel
            .as_ref()
            .filter(|(generation, channel)| *generation == live.generation && channel.status().connected());
        let current = match usable {
            Some((_, channel)) => channel.clone(),
            None => match timeout(STEP, live.connection.create_channel()).await {
                Ok(Ok(fresh)) => {
                    channel = Some((live.generation, fresh.clone()));
                    fresh
                }
                _ => continue,
            },
        };
        let sent = current.basic_publish(
            message.exchange.into(),
            message.key,
            BasicPublishOptions::default(),
            &message.body,
            message.properties,
        );
        if !matches!(timeout(STEP, sent).await, Ok(Ok(_))) {
            tracing::debug!("an event was lost");
            channel = None;
        }
    }
}

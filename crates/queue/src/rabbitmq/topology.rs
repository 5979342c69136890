//! What must be on the broker, as in the contract, and how it gets there.
//!
//! Everything is declared again on every new connection: a declaration that agrees with what is
//! there costs one round trip and changes nothing. One that does not agree is answered with 406,
//! which ends the channel; so declaring has a channel of its own.
//!
//! Job queues have a delivery limit and a dead-letter exchange, as the last net below the attempt
//! ledger (see [`super::records`]): a message that kills every consumer before it could be counted.
//! Dead-lettering at least once needs `reject-publish`; see
//! <https://www.rabbitmq.com/docs/quorum-queues#dead-lettering>.
//!
//! A queue's jobs of priority 4 wait in `hutch.jobs.<queue>`; other priorities have queues of their
//! own, `hutch.jobs.<queue>:<priority>`, made when first used: quorum queues know no priorities
//! before RabbitMQ 4.0, and only two until 4.3. Other programs need not know of these: what they send
//! to the plain queue is sorted, see [`super::sort`].

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

pub(super) const JOBS: &str = "hutch.jobs";
pub(super) const RESULTS: &str = "hutch.results";
pub(super) const EVENTS: &str = "hutch.events";
pub(super) const CONTROL: &str = "hutch.control";
pub(super) const DEAD: &str = "hutch.dead";

/// Deliveries after which the broker gives a message up. Above the most attempts that a job may
/// have, since a delivery that was no attempt counts here as well.
pub(super) const DELIVERY_LIMIT: u32 = 200;
/// The priority of what waits in a queue's plain queue: the default of a job.
pub(super) const PLAIN_PRIORITY: u8 = 4;
/// How long a gateway's own queue outlives the gateway. What it misses then it finds in the store.
const GATEWAY_EXPIRES_MS: i32 = 7 * 24 * 3_600_000;
/// Events that wait for a gateway that is slow.
const EVENTS_KEPT: i32 = 100_000;

/// One queue on the broker from which jobs are taken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source {
    /// The job queue's name, such as `default`.
    pub(super) queue: String,
    /// Its own priority; none for the plain queue.
    pub(super) band: Option<u8>,
}

impl Source {
    pub(super) fn plain(queue: &str) -> Self {
        Self { queue: queue.to_owned(), band: None }
    }

    /// Where a job of this priority waits.
    pub(super) fn of(queue: &str, priority: u8) -> Self {
        Self { queue: queue.to_owned(), band: (priority != PLAIN_PRIORITY).then_some(priority) }
    }

    pub(super) fn priority(&self) -> u8 {
        self.band.unwrap_or(PLAIN_PRIORITY)
    }

    /// Its routing key on the exchange for jobs.
    pub(super) fn key(&self) -> String {
        match self.band {
            Some(band) => format!("{}:{band}", self.queue),
            None => self.queue.clone(),
        }
    }

    /// Its name on the broker.
    pub(super) fn name(&self) -> String {
        format!("{JOBS}.{}", self.key())
    }
}

/// Declares what does not depend on a queue's name.
pub(super) async fn declare_base(channel: &Channel) -> lapin::Result<()> {
    for (name, kind) in [
        (JOBS, ExchangeKind::Direct),
        (RESULTS, ExchangeKind::Topic),
        (EVENTS, ExchangeKind::Topic),
        (CONTROL, ExchangeKind::Topic),
        (DEAD, ExchangeKind::Fanout),
    ] {
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await?;
    }
    for queue in [RESULTS, DEAD] {
        declare(channel, queue, durable(), quorum()).await?;
        bind(channel, queue, queue, "#").await?;
    }
    Ok(())
}

/// Declares a queue for jobs.
pub(super) async fn declare_source(channel: &Channel, source: &Source) -> lapin::Result<()> {
    let mut arguments = quorum();
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(DELIVERY_LIMIT.cast_signed()));
    arguments.insert("x-dead-letter-exchange".into(), text(DEAD));
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    let name = source.name();
    declare(channel, &name, durable(), arguments).await?;
    bind(channel, &name, JOBS, &source.key()).await
}

/// Declares the queue in which a gateway hears of every result, also of those while it was away.
pub(super) async fn declare_gateway(channel: &Channel, name: &str) -> lapin::Result<()> {
    let mut arguments = quorum();
    arguments.insert("x-expires".into(), AMQPValue::LongInt(GATEWAY_EXPIRES_MS));
    declare(channel, name, durable(), arguments).await?;
    bind(channel, name, RESULTS, "#").await
}

/// Declares a queue of this connection alone, bound to `exchange` by `keys`; its name.
pub(super) async fn declare_private(
    channel: &Channel,
    exchange: &str,
    keys: &[&str],
) -> lapin::Result<ShortString> {
    let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(EVENTS_KEPT));
    let queue = channel.queue_declare(ShortString::default(), options, arguments).await?;
    for key in keys {
        bind(channel, queue.name().as_str(), exchange, key).await?;
    }
    Ok(queue.name().clone())
}

/// How many messages wait in a queue that is there.
pub(super) async fn waiting(channel: &Channel, source: &Source) -> lapin::Result<u64> {
    let options = QueueDeclareOptions { passive: true, ..Default::default() };
    let queue = channel.queue_declare(source.name().into(), options, FieldTable::default()).await?;
    Ok(u64::from(queue.message_count()))
}

fn durable() -> QueueDeclareOptions {
    QueueDeclareOptions { durable: true, ..Default::default() }
}

fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments
}

pub(super) fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

async fn declare(
    channel: &Channel,
    name: &str,
    options: QueueDeclareOptions,
    arguments: FieldTable,
) -> lapin::Result<()> {
    channel.queue_declare(name.into(), options, arguments).await.map(drop)
}

pub(super) async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()).await
}

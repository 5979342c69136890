//! Messages, on their way in and out.
//!
//! Everything that hutch publishes is persistent, JSON, and names its kind in `type` and the job in
//! `message_id`. What comes in may be anybody's: nothing of it is trusted to be there or to be well
//! formed.

use hutch_proto::{Event, JobId, JobSpec, RESULT_TYPE, Timestamp};
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::topology::{self, Source};

/// Milliseconds since 1970 when hutch accepted the job.
const SUBMITTED_AT: &str = "x-hutch-submitted-at-ms";
/// The message was put back by hutch as a copy, so its history is not in the broker's counts.
const MOVED: &str = "x-hutch-moved";
/// Why a message is in the dead-letter queue.
const REASON: &str = "x-hutch-reason";
/// In which queue it was.
const QUEUE: &str = "x-hutch-queue";
/// The number of the `finished` event that goes with a result.
const SEQ: &str = "x-hutch-seq";

const PERSISTENT: u8 = 2;

/// A message to be published.
#[derive(Debug, Clone)]
pub(super) struct Message {
    pub(super) exchange: &'static str,
    pub(super) key: ShortString,
    pub(super) properties: BasicProperties,
    pub(super) body: bytes::Bytes,
}

/// Where an answer goes beside the exchange for results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReplyTo {
    pub(super) queue: ShortString,
    pub(super) correlation_id: Option<ShortString>,
}

/// A message in hand: it waits on the broker to be acknowledged.
#[derive(Debug)]
pub(super) struct Parcel {
    /// The slot on whose channel it came.
    pub(super) slot: u64,
    pub(super) source: Source,
    pub(super) delivery: Delivery,
}

impl Parcel {
    /// Whether it may have been delivered before.
    pub(super) fn came_before(&self) -> bool {
        self.delivery.redelivered || self.delivery_count() > 0 || self.header(MOVED).is_some()
    }

    /// How often it was returned, as far as the broker counts that.
    pub(super) fn delivery_count(&self) -> u32 {
        self.header("x-delivery-count").and_then(whole).and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
    }

    /// Whether it waits where its sender left it, and its sender is not one of our gateways, which know
    /// where a priority belongs.
    pub(super) fn is_unsorted(&self) -> bool {
        self.source.band.is_none() && self.header(SUBMITTED_AT).is_none()
    }

    /// When it was accepted, as far as somebody noted it.
    pub(super) fn submitted_at(&self) -> Timestamp {
        let noted = self.header(SUBMITTED_AT).and_then(whole);
        let seconds = self.delivery.properties.timestamp().and_then(|s| i64::try_from(s).ok());
        noted
            .or_else(|| seconds.map(|seconds| seconds.saturating_mul(1000)))
            .map_or_else(Timestamp::now, Timestamp::from_unix_ms)
    }

    pub(super) fn reply_to(&self) -> Option<ReplyTo> {
        let properties = &self.delivery.properties;
        let queue = properties.reply_to().clone().filter(|queue| !queue.as_str().is_empty())?;
        Some(ReplyTo { queue, correlation_id: properties.correlation_id().clone() })
    }

    fn header(&self, name: &str) -> Option<&AMQPValue> {
        self.delivery.properties.headers().as_ref().and_then(|headers| headers.inner().get(name))
    }

    /// A copy of it for `source`, under this id.
    pub(super) fn moved_to(&self, source: &Source, id: JobId) -> Message {
        let mut headers = self.delivery.properties.headers().clone().unwrap_or_default();
        headers.insert(MOVED.into(), AMQPValue::Boolean(true));
        headers.insert(SUBMITTED_AT.into(), AMQPValue::LongLongInt(self.submitted_at().unix_ms()));
        let properties = self.delivery.properties.clone();
        Message {
            exchange: topology::JOBS,
            key: source.key().into(),
            properties: properties
                .with_headers(headers)
                .with_message_id(id.to_string().into())
                .with_delivery_mode(PERSISTENT),
            body: self.delivery.data.clone().into(),
        }
    }

    /// A copy of it for the dead letters.
    pub(super) fn dead(&self, id: Option<JobId>, reason: &str) -> Message {
        let mut headers = self.delivery.properties.headers().clone().unwrap_or_default();
        headers.insert(REASON.into(), topology::text(reason));
        headers.insert(QUEUE.into(), topology::text(&self.source.queue));
        let mut properties =
            self.delivery.properties.clone().with_headers(headers).with_delivery_mode(PERSISTENT);
        if let Some(id) = id {
            properties = properties.with_message_id(id.to_string().into());
        }
        Message {
            exchange: topology::DEAD,
            key: self.source.key().into(),
            properties,
            body: self.delivery.data.clone().into(),
        }
    }
}

/// A job on its way to its queue.
pub(super) fn job(job: &JobSpec, json: Vec<u8>, source: &Source, submitted_at: Timestamp) -> Message {
    let mut headers = FieldTable::default();
    headers.insert(SUBMITTED_AT.into(), AMQPValue::LongLongInt(submitted_at.unix_ms()));
    let properties = properties(hutch_proto::JOB_TYPE, job.id)
        .with_priority(job.priority)
        .with_timestamp(u64::try_from(submitted_at.unix_ms() / 1000).unwrap_or(0))
        .with_headers(headers);
    Message { exchange: topology::JOBS, key: source.key().into(), properties, body: json.into() }
}

/// A result on its way to everybody.
pub(super) fn result(record: &super::records::Record, queue: &str, seq: Option<u64>) -> Message {
    let mut headers = FieldTable::default();
    if let Some(seq) = seq.and_then(|seq| i64::try_from(seq).ok()) {
        headers.insert(SEQ.into(), AMQPValue::LongLongInt(seq));
    }
    let id = record.result.id;
    Message {
        exchange: topology::RESULTS,
        key: format!("{queue}.{}.{id}", record.result.status).into(),
        properties: properties(RESULT_TYPE, id).with_headers(headers),
        body: record.json.clone(),
    }
}

/// The same result on its way to who asked.
pub(super) fn reply(record: &super::records::Record, to: &ReplyTo) -> Message {
    let mut properties = properties(RESULT_TYPE, record.result.id);
    if let Some(correlation_id) = &to.correlation_id {
        properties = properties.with_correlation_id(correlation_id.clone());
    }
    Message { exchange: "", key: to.queue.clone(), properties, body: record.json.clone() }
}

/// An event on its way to everybody.
pub(super) fn event(event: &Event) -> serde_json::Result<Message> {
    Ok(Message {
        exchange: topology::EVENTS,
        key: format!("job.{}.{}", event.id, event.kind.name()).into(),
        properties: properties(hutch_proto::EVENT_TYPE, event.id),
        body: serde_json::to_vec(event)?.into(),
    })
}

/// The wish that a job be cancelled.
pub(super) fn cancel(id: JobId) -> Message {
    Message {
        exchange: topology::CONTROL,
        key: format!("cancel.{id}").into(),
        properties: BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_message_id(id.to_string().into()),
        body: bytes::Bytes::new(),
    }
}

/// Word that a queue has a priority that it had not before.
pub(super) fn new_band(queue: &str) -> Message {
    Message {
        exchange: topology::CONTROL,
        key: format!("band.{queue}").into(),
        properties: BasicProperties::default().with_delivery_mode(PERSISTENT),
        body: bytes::Bytes::new(),
    }
}

/// Word that a job has come to a queue, for workers that wait for several.
pub(super) fn bell(queue: &str) -> Message {
    Message {
        exchange: topology::CONTROL,
        key: format!("bell.{queue}").into(),
        properties: BasicProperties::default(),
        body: bytes::Bytes::new(),
    }
}

/// The queue's name in a result's routing key.
pub(super) fn queue_of(result_key: &str) -> &str {
    let mut parts = result_key.rsplitn(3, '.');
    parts.nth(2).unwrap_or_default()
}

/// The job's id in a message's properties.
pub(super) fn message_id(properties: &BasicProperties) -> Option<JobId> {
    properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok())
}

/// The number of the event that goes with a result.
pub(super) fn seq_of(properties: &BasicProperties) -> Option<u64> {
    let headers = properties.headers().as_ref()?;
    headers.inner().get(SEQ).and_then(whole).and_then(|seq| u64::try_from(seq).ok())
}

fn properties(kind: &str, id: JobId) -> BasicProperties {
    BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(PERSISTENT)
        .with_type(kind.into())
        .with_message_id(id.to_string().into())
}

/// A number in a header, of whatever width the sender chose.
fn whole(value: &AMQPValue) -> Option<i64> {
    match *value {
        AMQPValue::ShortShortInt(n) => Some(n.into()),
        AMQPValue::ShortShortUInt(n) => Some(n.into()),
        AMQPValue::ShortInt(n) => Some(n.into()),
        AMQPValue::ShortUInt(n) => Some(n.into()),
        AMQPValue::LongInt(n) => Some(n.into()),
        AMQPValue::LongUInt(n) => Some(n.into()),
        AMQPValue::LongLongInt(n) => Some(n),
        _ => None,
    }
}

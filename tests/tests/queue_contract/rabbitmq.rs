//! RabbitMQ: the contract, and what a broker alone can do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hutch_proto::{JobId, JobResult, JobSpec, JobState, Reason, Status};
use hutch_queue::rabbitmq::{RabbitConfig, RabbitQueue};
use hutch_queue::{CancelOutcome, Finished, GiveBack, Queue, QueueError, Submitted};
use hutch_tests::broker::Broker;
use lapin::BasicProperties;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use object_store::memory::InMemory;

use crate::amqp::{Foreign, header};
use crate::home::{Home, consumer, job, result, soon, success, take, unique, until, view};

/// One gateway that is also a worker, on a broker that all tests share.
struct Rabbit {
    queue: Arc<RabbitQueue>,
    store: Arc<InMemory>,
    foreign: Foreign,
    letters: crate::amqp::Tap,
    _directory: tempfile::TempDir,
}

async fn gateway(url: &str, directory: &std::path::Path, store: &Arc<InMemory>) -> Arc<RabbitQueue> {
    let mut config = RabbitConfig::new(url, store.clone());
    config.index = Some(directory.join("index.db"));
    Arc::new(RabbitQueue::connect(config).await.unwrap())
}

async fn worker(url: &str, store: &Arc<InMemory>) -> Arc<dyn Queue> {
    Arc::new(RabbitQueue::connect(RabbitConfig::new(url, store.clone())).await.unwrap())
}

impl Home for Rabbit {
    async fn start() -> Self {
        let url = Broker::shared().url();
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::default();
        let queue = gateway(url, directory.path(), &store).await;
        let foreign = Foreign::connect(url).await;
        let letters = foreign.tap("hutch.dead", "#").await;
        Self { queue, store, foreign, letters, _directory: directory }
    }

    fn queue(&self) -> Arc<dyn Queue> {
        self.queue.clone()
    }

    async fn dead_letters(&self) -> Vec<(JobId, String)> {
        let letters = self.letters.seen();
        let id = |letter: &crate::amqp::Seen| letter.properties.message_id().as_ref()?.as_str().parse().ok();
        letters
            .iter()
            .filter_map(|letter| Some((id(letter)?, header(&letter.properties, "x-hutch-reason")?)))
            .collect()
    }
}

crate::suite::every_scenario!(Rabbit);

fn body(queue: &str) -> serde_json::Value {
    serde_json::json!({"layers": ["host"], "command": ["true"], "queue": queue})
}

/// What a client with nothing but an AMQP library does: JSON to the exchange, the queue's name as
/// key, a reply wanted.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_client_gets_a_reply() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("foreign"));
    let mut consumer = consumer(&queue, &name).await;
    let results = home.foreign.tap("hutch.results", &format!("{name}.#")).await;
    let replies = home.foreign.reply_queue().await;
    let id = JobId::generate();
    let properties = BasicProperties::default()
        .with_message_id(id.to_string().into())
        .with_reply_to(replies.name())
        .with_correlation_id("call 7".into());
    // The id is in the properties alone.
    home.foreign.publish("hutch.jobs", &name, body(&name).to_string().as_bytes(), properties).await;

    let lease = take(&mut consumer).await;
    assert_eq!((lease.job.id, lease.attempt), (id, 1));
    let answer = success(&lease, "6\n");
    assert_eq!(consumer.finish(lease, answer.clone()).await.unwrap(), Finished::Recorded);

    let reply = until("the reply", || async { replies.seen().into_iter().next() }).await;
    assert_eq!(reply.json::<JobResult>(), answer);
    assert_eq!(reply.properties.correlation_id().as_ref().unwrap().as_str(), "call 7");
    let told = until("the result", || async { results.seen().into_iter().next() }).await;
    assert_eq!(told.key, format!("{name}.succeeded.{id}"));
    assert_eq!(told.body, reply.body);
    assert_eq!(told.properties.kind().as_ref().unwrap().as_str(), "hutch.result.v1");
    assert_eq!(told.properties.message_id().as_ref().unwrap().as_str(), id.to_string());
    assert_eq!(*told.properties.delivery_mode(), Some(2));
    assert_eq!(told.properties.content_type().as_ref().unwrap().as_str(), "application/json");
    assert_eq!(result(&queue, id).await, answer, "the gateway shows it as well");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_without_an_id_is_given_one() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("nameless"));
    let mut consumer = consumer(&queue, &name).await;
    let replies = home.foreign.reply_queue().await;
    for number in 0..3 {
        let properties = BasicProperties::default()
            .with_reply_to(replies.name())
            .with_correlation_id(number.to_string().into());
        home.foreign.publish("hutch.jobs", &name, body(&name).to_string().as_bytes(), properties).await;
    }
    let mut ids = Vec::new();
    for _ in 0..3 {
        let lease = take(&mut consumer).await;
        assert_eq!(lease.attempt, 1);
        ids.push(lease.job.id);
        let answer = success(&lease, "");
        consumer.finish(lease, answer).await.unwrap();
    }
    let seen = until("three replies", || async { Some(replies.seen()).filter(|seen| seen.len() == 3) }).await;
    let answered: BTreeMap<String, JobId> = seen
        .iter()
        .map(|reply| {
            let call = reply.properties.correlation_id().as_ref().unwrap().to_string();
            (call, reply.json::<JobResult>().id)
        })
        .collect();
    assert_eq!(answered.into_values().collect::<Vec<_>>(), ids, "in the order in which they came");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_kept_with_its_reason() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("garbage"));
    let mut consumer = consumer(&queue, &name).await;
    let results = home.foreign.tap("hutch.results", &format!("{name}.#")).await;
    let (by_property, by_json) = (JobId::generate(), JobId::generate());
    let publish = async |text: &str, properties| {
        home.foreign.publish("hutch.jobs", &name, text.as_bytes(), properties).await;
    };
    publish("not json at all", BasicProperties::default().with_app_id(name.as_str().into())).await;
    publish("{\"laers\": []}", BasicProperties::default().with_message_id(by_property.to_string().into()))
        .await;
    publish(
        &serde_json::json!({"id": by_json, "layers": ["host"], "command": ["true"], "priority": 99})
            .to_string(),
        BasicProperties::default(),
    )
    .await;
    // What comes after them is reached.
    let last = job(&name);
    queue.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id);

    for (id, what) in [(by_property, "laers"), (by_json, "priority")] {
        let answer = result(&queue, id).await;
        assert_eq!((answer.status, answer.reason), (Status::Rejected, Some(Reason::SpecInvalid)));
        assert!(answer.message.contains(what), "{}", answer.message);
        let told = until("the result", || async {
            results.seen().into_iter().find(|told| told.key == format!("{name}.rejected.{id}"))
        })
        .await;
        assert_eq!(told.json::<JobResult>(), answer);
        let letters = home.dead_letters().await;
        let letter = letters.iter().find(|(dead, _)| *dead == id).unwrap();
        assert!(letter.1.starts_with("spec_invalid: ") && letter.1.contains(what), "{letter:?}");
    }
    let nameless = home.letters.seen().into_iter().find(|letter| letter.body == b"not json at all").unwrap();
    assert!(header(&nameless.properties, "x-hutch-reason").unwrap().contains("not JSON"));
    assert_eq!(header(&nameless.properties, "x-hutch-queue").unwrap(), name);
    assert_eq!(nameless.properties.app_id().as_ref().unwrap().as_str(), name, "the rest of it is kept");
}

/// A client that retries publishes the same message again; and asks for each answer.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_message_three_times_is_run_once() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("thrice"));
    let mut first = consumer(&queue, &name).await;
    let mut second = consumer(&queue, &name).await;
    let replies = home.foreign.reply_queue().await;
    let mut text = body(&name);
    text["id"] = JobId::generate().to_string().into();
    for call in ["a", "b", "c"] {
        let properties =
            BasicProperties::default().with_reply_to(replies.name()).with_correlation_id(call.into());
        home.foreign.publish("hutch.jobs", &name, text.to_string().as_bytes(), properties).await;
    }
    let lease = take(&mut first).await;
    // The other slot gets the copies, and must run none of them beside the first.
    let last = job(&name);
    let copies = tokio::time::timeout(Duration::from_millis(500), second.take()).await;
    assert!(copies.is_err(), "run twice at once");
    let answer = success(&lease, "once");
    first.finish(lease, answer.clone()).await.unwrap();
    queue.submit(&last).await.unwrap();
    let next = tokio::select! {
        lease = first.take() => lease,
        lease = second.take() => lease,
    };
    assert_eq!(next.unwrap().job.id, last.id);
    let seen = until("three replies", || async { Some(replies.seen()).filter(|seen| seen.len() == 3) }).await;
    assert!(seen.iter().all(|reply| reply.json::<JobResult>() == answer));
    let mut calls: Vec<_> =
        seen.iter().map(|reply| reply.properties.correlation_id().as_ref().unwrap().to_string()).collect();
    calls.sort();
    assert_eq!(calls, ["a", "b", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn priorities_of_foreign_messages_are_kept() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("foreign-priority"));
    // So that the queue is there.
    drop(consumer(&queue, &name).await);
    let ids: Vec<JobId> = (0..3).map(|_| JobId::generate()).collect();
    let publish = async |id: JobId, key: &str, priority: Option<u8>, json_priority: Option<u8>| {
        let mut text = body(&name);
        text["id"] = id.to_string().into();
        if let Some(priority) = json_priority {
            text["priority"] = priority.into();
        }
        let mut properties = BasicProperties::default();
        if let Some(priority) = priority {
            properties = properties.with_priority(priority);
        }
        home.foreign.publish("hutch.jobs", key, text.to_string().as_bytes(), properties).await;
    };
    publish(ids[0], &name, Some(2), None).await;
    publish(ids[1], &name, None, Some(1)).await;
    publish(ids[2], &name, None, None).await;
    let mut consumer = consumer(&queue, &name).await;
    let mut order = Vec::new();
    for _ in 0..3 {
        let lease = take(&mut consumer).await;
        order.push((lease.job.id, lease.job.priority));
        let answer = success(&lease, "");
        consumer.finish(lease, answer).await.unwrap();
    }
    assert_eq!(order, [(ids[2], 4), (ids[0], 2), (ids[1], 1)]);
}

impl Rabbit {
    /// Publishes as another program does: to the job queue's name, whatever the priority.
    async fn publish(&self, name: &str, priority: u8) -> JobId {
        let id = JobId::generate();
        let mut text = body(name);
        text["id"] = id.to_string().into();
        text["priority"] = priority.into();
        text["max_attempts"] = 1.into();
        self.foreign.publish("hutch.jobs", name, text.to_string().as_bytes(), Default::default()).await;
        id
    }
}

/// Takes and finishes the next job; its id, priority and attempt.
async fn run(consumer: &mut Box<dyn hutch_queue::Consumer>) -> (JobId, u8, u32) {
    let lease = take(consumer).await;
    let seen = (lease.job.id, lease.job.priority, lease.attempt);
    let answer = success(&lease, "");
    assert_eq!(consumer.finish(lease, answer).await.unwrap(), Finished::Recorded);
    seen
}

/// Highest first, and those of one priority in the order in which they came; no attempt is spent by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_foreign_messages_is_sorted() {
    const PRIORITIES: [u8; 8] = [0, 4, 31, 5, 10, 4, 31, 3];
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("backlog"));
    // So that the queue is there.
    drop(consumer(&queue, &name).await);
    let mut expected = Vec::new();
    // More than are in hand at one time.
    for (number, priority) in PRIORITIES.iter().cycle().take(40).enumerate() {
        expected.push((31 - priority, number, home.publish(&name, *priority).await));
    }
    expected.sort();
    let mut consumer = consumer(&queue, &name).await;
    for (below, _, id) in expected {
        assert_eq!(run(&mut consumer).await, (id, 31 - below, 1));
    }
}

/// While a slot is busy, what comes waits with what waits already, whoever sent it.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_messages_wait_with_ours() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("together"));
    let mut consumer = consumer(&queue, &name).await;
    home.publish(&name, 4).await;
    let busy = take(&mut consumer).await;
    let low = home.publish(&name, 1).await;
    let first = home.publish(&name, 4).await;
    let ours = job(&name);
    queue.submit(&ours).await.unwrap();
    let last = home.publish(&name, 4).await;
    let mut urgent = job(&name);
    urgent.priority = 20;
    queue.submit(&urgent).await.unwrap();
    let answer = success(&busy, "");
    consumer.finish(busy, answer).await.unwrap();
    assert_eq!(run(&mut consumer).await, (urgent.id, 20, 1));
    assert_eq!(run(&mut consumer).await, (first, 4, 1));
    // It overtakes what was sorted before it came.
    let late = home.publish(&name, 31).await;
    assert_eq!(run(&mut consumer).await, (late, 31, 1));
    assert_eq!(run(&mut consumer).await, (ours.id, 4, 1));
    assert_eq!(run(&mut consumer).await, (last, 4, 1));
    assert_eq!(run(&mut consumer).await, (low, 1, 1));
}

/// A worker elsewhere, without an index of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_wish_to_cancel_reaches_a_worker_elsewhere() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("elsewhere"));
    let away = worker(Broker::shared().url(), &home.store).await;
    let mut consumer = consumer(&away, &name).await;
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let lease = take(&mut consumer).await;
    away.publish(crate::suite::started(&lease)).await;
    view(&queue, spec.id, JobState::Running).await;
    assert_eq!(queue.cancel(spec.id).await.unwrap(), CancelOutcome::Accepted);
    soon("the wish to cancel", consumer.cancelled(spec.id)).await;
    consumer.give_back(lease, GiveBack::Unspent).await.unwrap();
    assert_eq!(result(&queue, spec.id).await.reason, Some(Reason::Requested));
}

/// `cancel.<id>` by AMQP alone, for a job that waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_wish_to_cancel_by_amqp_is_kept() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("amqp-cancel"));
    let away = worker(Broker::shared().url(), &home.store).await;
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    home.foreign.publish("hutch.control", &format!("cancel.{}", spec.id), b"", Default::default()).await;
    let marks = object_store::path::Path::from(format!("cancelled/{}", spec.id));
    until("the mark", || async { object_store::ObjectStoreExt::head(&*home.store, &marks).await.ok() }).await;
    let mut consumer = consumer(&away, &name).await;
    let last = job(&name);
    queue.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id);
    assert_eq!(result(&queue, spec.id).await.reason, Some(Reason::Requested));
}

/// The index is a view: what it missed is found all the same, and what was accepted stays known.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_was_away_catches_up() {
    let url = Broker::shared().url();
    let (directory, store) = (tempfile::tempdir().unwrap(), Arc::default());
    let first = gateway(url, directory.path(), &store).await;
    let name = unique("away");
    let spec = job(&name);
    first.submit(&spec).await.unwrap();
    first.close().await;
    assert!(matches!(first.submit(&spec).await, Err(QueueError::Closed)));

    let away = worker(url, &store).await;
    let mut consumer = consumer(&away, &name).await;
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "while it was away");
    consumer.finish(lease, answer.clone()).await.unwrap();
    assert_eq!(away.get(spec.id).await.unwrap().unwrap().result, Some(answer.clone()));

    let second: Arc<dyn Queue> = gateway(url, directory.path(), &store).await;
    assert_eq!(second.submit(&spec).await.unwrap(), Submitted::Known);
    assert_eq!(result(&second, spec.id).await, answer);
    assert_eq!(second.cancel(spec.id).await.unwrap(), CancelOutcome::AlreadyFinished);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_setup_is_told_at_once() {
    let connect = async |url: &str| {
        let mut config = RabbitConfig::new(url, Arc::new(InMemory::new()));
        config.connect_timeout = Duration::from_secs(20);
        RabbitQueue::connect(config).await.map(drop).unwrap_err()
    };
    let url = Broker::shared().url();
    let refused = connect(&url.replace("guest:guest", "guest:wrong")).await;
    assert!(matches!(&refused, QueueError::Setup(why) if why.contains("ACCESS_REFUSED")), "{refused}");
    let nowhere = connect(&url.replace("%2f", "nowhere")).await;
    assert!(matches!(&nowhere, QueueError::Setup(why) if why.contains("nowhere")), "{nowhere}");
    for wrong in ["http://x", "amqps://x"] {
        assert!(matches!(connect(wrong).await, QueueError::Setup(_)));
    }
    let mut config = RabbitConfig::new("amqp://127.0.0.1:1", Arc::new(InMemory::new()));
    config.connect_timeout = Duration::from_millis(300);
    let absent = RabbitQueue::connect(config).await.map(drop).unwrap_err();
    assert!(matches!(&absent, QueueError::Unavailable(why) if why.contains("127.0.0.1:1")), "{absent}");
}

/// Something under hutch's names that is set up otherwise: nothing is taken from it.
#[tokio::test(flavor = "multi_thread")]
async fn another_topology_is_refused() {
    let home = Rabbit::start().await;
    let name = unique("classic");
    let channel = home.foreign.channel().await;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let direct = lapin::ExchangeKind::Direct;
    channel.exchange_declare("hutch.jobs".into(), direct, durable, FieldTable::default()).await.unwrap();
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    let queue = format!("hutch.jobs.{name}");
    channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await.unwrap();
    let config = hutch_queue::ConsumerConfig {
        worker: "w".to_owned(),
        queues: vec![name.clone()],
        lease: Duration::from_secs(30),
    };
    let error = home.queue.consumer(&config).await.map(drop).unwrap_err();
    let QueueError::Setup(why) = error else { panic!("{error}") };
    assert!(why.contains(&queue) && why.contains("delete it"), "{why}");
    assert!(matches!(home.queue.submit(&job(&name)).await, Err(QueueError::Setup(_))));
    channel.queue_delete(queue.as_str().into(), Default::default()).await.unwrap();
    assert_eq!(home.queue.submit(&job(&name)).await.unwrap(), Submitted::New);
}

/// A spec of the size that is allowed at most.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_job_travels() {
    let home = Rabbit::start().await;
    let (queue, name) = (home.queue(), unique("large"));
    let mut text = body(&name);
    text["stdin"] = serde_json::json!({"text": "x".repeat(7 << 20)});
    let spec = JobSpec::parse(text.to_string().as_bytes()).unwrap();
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    assert_eq!(take(&mut consumer).await.job, spec);
}

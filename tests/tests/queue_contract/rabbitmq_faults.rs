//! RabbitMQ, and what breaks around it: connections that are cut, brokers that are killed, workers that
//! vanish, stores that fail. What must hold each time: no job is lost, and none has two results.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hutch_proto::{JobId, JobResult, JobState, Reason, Status};
use hutch_queue::rabbitmq::{RabbitConfig, RabbitQueue};
use hutch_queue::{Finished, GiveBack, Queue, QueueError};
use hutch_tests::broker::Broker;
use hutch_tests::proxy::Proxy;
use lapin::options::{BasicGetOptions, QueueDeleteOptions};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use tokio::task::JoinSet;

use crate::amqp::Foreign;
use crate::home::{consumer, job, result, soon, success, take, unique, until, view};
use crate::store::Flaky;

fn config(url: &str, store: &Arc<dyn ObjectStore>) -> RabbitConfig {
    let mut config = RabbitConfig::new(url, Arc::clone(store));
    config.confirm_timeout = Duration::from_secs(3);
    config
}

async fn gateway(url: &str, directory: &Path, store: &Arc<dyn ObjectStore>) -> Arc<dyn Queue> {
    let mut config = config(url, store);
    config.index = Some(directory.join("index.db"));
    Arc::new(RabbitQueue::connect(config).await.unwrap())
}

async fn worker(url: &str, store: &Arc<dyn ObjectStore>) -> Arc<dyn Queue> {
    Arc::new(RabbitQueue::connect(config(url, store)).await.unwrap())
}

fn memory() -> Arc<dyn ObjectStore> {
    hutch_tests::log();
    Arc::new(InMemory::new())
}

/// Jobs that flow from a gateway through workers, and what became of them.
struct Flow {
    name: String,
    gateway: Arc<dyn Queue>,
    sent: Vec<JobId>,
    ran: Arc<Mutex<HashMap<JobId, usize>>>,
    tasks: JoinSet<()>,
}

impl Flow {
    /// Sends `jobs` jobs, as fast as they go, and runs them in `slots` slots.
    async fn start(gateway: &Arc<dyn Queue>, worker: &Arc<dyn Queue>, jobs: usize, slots: usize) -> Self {
        let name = unique("flow");
        let ran: Arc<Mutex<HashMap<JobId, usize>>> = Arc::default();
        let mut tasks = JoinSet::new();
        for _ in 0..slots {
            let mut consumer = consumer(worker, &name).await;
            let ran = Arc::clone(&ran);
            tasks.spawn(async move {
                while let Ok(lease) = consumer.take().await {
                    *ran.lock().unwrap().entry(lease.job.id).or_default() += 1;
                    let answer = success(&lease, &format!("{} {}", lease.job.id, lease.attempt));
                    consumer.finish(lease, answer).await.unwrap();
                }
            });
        }
        let specs: Vec<_> = (0..jobs).map(|_| job(&name)).collect();
        let sent = specs.iter().map(|spec| spec.id).collect();
        let queue = Arc::clone(gateway);
        tasks.spawn(async move {
            for spec in specs {
                // As a client does that was answered 503.
                while let Err(e) = queue.submit(&spec).await {
                    assert!(matches!(e, QueueError::Unavailable(_)), "{e}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
        Self { name, gateway: Arc::clone(gateway), sent, ran, tasks }
    }

    /// Waits until `count` jobs have begun.
    async fn reach(&self, count: usize) {
        until("jobs to flow", || async { (self.ran.lock().unwrap().len() >= count).then_some(()) }).await;
    }

    /// Waits for every result, then looks for what may not be.
    async fn settle(mut self, url: &str) {
        for id in &self.sent {
            let answer = result(&self.gateway, *id).await;
            assert_eq!(answer.status, Status::Succeeded, "{}", answer.message);
            assert!(answer.stdout.data.starts_with(id.to_string().as_bytes()));
        }
        self.tasks.abort_all();
        while self.tasks.join_next().await.is_some() {}
        let sent: HashSet<_> = self.sent.iter().copied().collect();
        let mut told: HashMap<JobId, Vec<Vec<u8>>> = HashMap::new();
        let begin = Instant::now();
        // The gateway has a queue of its own, and may hear of the last result before it is in this one.
        while told.len() < sent.len() && begin.elapsed() < Duration::from_secs(10) {
            for (id, bodies) in drain_results(url, &self.name).await {
                told.entry(id).or_default().extend(bodies);
            }
        }
        assert_eq!(
            told.keys().copied().collect::<HashSet<_>>(),
            sent,
            "results for just the jobs that were sent"
        );
        for (id, bodies) in &told {
            assert!(bodies.windows(2).all(|pair| pair[0] == pair[1]), "{id} has two different results");
        }
        let ran: usize = self.ran.lock().unwrap().values().sum();
        let messages: usize = told.values().map(Vec::len).sum();
        eprintln!("{} jobs, {ran} runs, {messages} result messages", sent.len());
    }
}

/// What came to the queue for results, by job, for one queue's jobs.
async fn drain_results(url: &str, name: &str) -> HashMap<JobId, Vec<Vec<u8>>> {
    let channel = Foreign::connect(url).await.channel().await;
    let mut told: HashMap<JobId, Vec<Vec<u8>>> = HashMap::new();
    let options = BasicGetOptions { no_ack: true };
    while let Some(message) = channel.basic_get("hutch.results".into(), options).await.unwrap() {
        if message.routing_key.as_str().starts_with(name) {
            let result: JobResult = serde_json::from_slice(&message.data).unwrap();
            told.entry(result.id).or_default().push(message.delivery.data);
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_loses_nothing() {
    let mut broker = tokio::task::block_in_place(Broker::start);
    let (url, store, directory) = (broker.url(), memory(), tempfile::tempdir().unwrap());
    let gateway = gateway(&url, directory.path(), &store).await;
    let worker = worker(&url, &store).await;
    let flow = Flow::start(&gateway, &worker, 2000, 4).await;
    for round in 1..=2 {
        flow.reach(round * 80).await;
        tokio::task::block_in_place(|| broker.kill9());
        until("the loss to be noticed", || async { (!worker.connected()).then_some(()) }).await;
        tokio::task::block_in_place(|| broker.restart());
        let begin = Instant::now();
        until("the queue to be back", || async { worker.connected().then_some(()) }).await;
        assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    }
    flow.settle(&url).await;
    assert!(worker.counters().reconnects >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_lose_nothing() {
    let broker = tokio::task::block_in_place(Broker::start);
    let (store, directory) = (memory(), tempfile::tempdir().unwrap());
    let (proxy, url) = Proxy::before(&broker.url()).await.unwrap();
    let gateway = gateway(&broker.url(), directory.path(), &store).await;
    let worker = worker(&url, &store).await;
    let flow = Flow::start(&gateway, &worker, 2000, 4).await;
    for round in 1..=15 {
        flow.reach(round * 60).await;
        proxy.cut();
    }
    flow.settle(&broker.url()).await;
    assert!(worker.counters().reconnects >= 15, "{:?}", worker.counters());
}

/// The job goes on, and its result is told on the new connection; what the broker delivers again
/// meanwhile joins it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_in_hand_survives_a_cut() {
    let (store, directory) = (memory(), tempfile::tempdir().unwrap());
    let (proxy, url) = Proxy::before(Broker::shared().url()).await.unwrap();
    let gateway = gateway(Broker::shared().url(), directory.path(), &store).await;
    let worker = worker(&url, &store).await;
    let name = unique("cut");
    let mut first = consumer(&worker, &name).await;
    let mut second = consumer(&worker, &name).await;
    let mut spec = job(&name);
    spec.max_attempts = 1;
    gateway.submit(&spec).await.unwrap();
    let lease = take(&mut first).await;
    for _ in 0..3 {
        let before = worker.counters();
        proxy.cut();
        // The other slot gets the job again, must see that it is in hand, and goes on to the next.
        let other = job(&name);
        let taking = tokio::spawn(async move {
            let lease = take(&mut second).await;
            (second, lease)
        });
        until("the job to come again", || async {
            (worker.counters().redeliveries > before.redeliveries).then_some(())
        })
        .await;
        // As the slot that has the copy may not take more, another helps.
        let mut third = consumer(&worker, &name).await;
        gateway.submit(&other).await.unwrap();
        let lease = tokio::select! {
            lease = third.take() => lease.unwrap(),
            taken = taking => {
                let (consumer, lease) = taken.unwrap();
                third = consumer;
                lease
            }
        };
        assert_eq!(lease.job.id, other.id, "the job in hand was run twice");
        let answer = success(&lease, "");
        third.finish(lease, answer).await.unwrap();
        second = third;
    }
    let answer = success(&lease, "after three cuts");
    assert_eq!(first.finish(lease, answer.clone()).await.unwrap(), Finished::Recorded);
    assert_eq!(result(&gateway, spec.id).await, answer);
}

/// A worker that ends without a word: its runtime is torn down, as by SIGKILL.
struct Doomed {
    runtime: tokio::runtime::Runtime,
    id: JobId,
}

impl Doomed {
    /// Takes the next job and holds it.
    async fn take(url: &str, store: &Arc<dyn ObjectStore>, name: &str) -> (Self, u32) {
        let (url, store, name) = (url.to_owned(), Arc::clone(store), name.to_owned());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let taken = runtime.spawn(async move {
            let queue = worker(&url, &store).await;
            let mut consumer = consumer(&queue, &name).await;
            let lease = take(&mut consumer).await;
            let taken = (lease.job.id, lease.attempt);
            std::mem::forget((queue, consumer, lease));
            taken
        });
        let (id, attempt) = taken.await.unwrap();
        (Self { runtime, id }, attempt)
    }

    fn vanish(self) -> JobId {
        self.runtime.shutdown_background();
        self.id
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_vanishes_spends_an_attempt() {
    let (url, store, directory) = (Broker::shared().url(), memory(), tempfile::tempdir().unwrap());
    let gateway = gateway(url, directory.path(), &store).await;
    let letters = Foreign::connect(url).await;
    let letters = letters.tap("hutch.dead", "#").await;
    let name = unique("vanish");
    let mut spec = job(&name);
    spec.max_attempts = 2;
    gateway.submit(&spec).await.unwrap();
    for expected in 1..=2 {
        let (doomed, attempt) = Doomed::take(url, &store, &name).await;
        assert_eq!(attempt, expected);
        assert_eq!(doomed.vanish(), spec.id);
    }
    let worker = worker(url, &store).await;
    let mut survivor = consumer(&worker, &name).await;
    let last = job(&name);
    gateway.submit(&last).await.unwrap();
    assert_eq!(take(&mut survivor).await.job.id, last.id, "the job has no attempt left");
    let answer = result(&gateway, spec.id).await;
    assert_eq!((answer.status, answer.reason), (Status::InfraError, Some(Reason::WorkerLost)));
    assert_eq!(answer.attempt, 2);
    let id = spec.id.to_string();
    let dead = letters
        .seen()
        .into_iter()
        .filter(|letter| letter.properties.message_id().as_ref().is_some_and(|dead| dead.as_str() == id));
    assert_eq!(dead.count(), 1);
}

/// Cut off, but alive: neither its attempt nor its result may be lost, even on the last attempt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_cut_off_is_not_lost() {
    let (store, directory) = (memory(), tempfile::tempdir().unwrap());
    let url = Broker::shared().url();
    let (proxy, cut_off_url) = Proxy::before(url).await.unwrap();
    let gateway = gateway(url, directory.path(), &store).await;
    let cut_off = worker(&cut_off_url, &store).await;
    let other = worker(url, &store).await;
    let name = unique("cut-off");
    let mut spec = job(&name);
    spec.max_attempts = 1;
    gateway.submit(&spec).await.unwrap();
    let mut first = consumer(&cut_off, &name).await;
    let lease = take(&mut first).await;
    proxy.refuse(true);
    proxy.cut();
    let mut second = consumer(&other, &name).await;
    let again = take(&mut second).await;
    assert_eq!((again.job.id, again.attempt), (spec.id, 1));
    let (one, two) = (success(&lease, "the first"), success(&again, "the second"));
    let finishing = tokio::spawn(async move { first.finish(lease, one).await });
    let path = object_store::path::Path::from(format!("results/{}", spec.id));
    until("the record", || async { object_store::ObjectStoreExt::head(&*store, &path).await.ok() }).await;
    assert_eq!(second.finish(again, two).await.unwrap(), Finished::AlreadyFinished);
    proxy.refuse(false);
    assert_eq!(soon("the end", finishing).await.unwrap().unwrap(), Finished::Recorded);
    assert_eq!(result(&gateway, spec.id).await.stdout.data, b"the first");
}

/// A crash between record and publication: whoever gets the job again tells the record's bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_was_not_told_is_told() {
    let (url, store, directory) = (Broker::shared().url(), memory(), tempfile::tempdir().unwrap());
    let gateway = gateway(url, directory.path(), &store).await;
    let name = unique("untold");
    let spec = job(&name);
    let mut answer = JobResult::without_run(
        spec.id,
        spec.labels.clone(),
        hutch_proto::Timestamp::now(),
        Reason::Memory,
        "as it was recorded",
    );
    answer.worker = "w-crashed".to_owned();
    let json = serde_json::to_vec_pretty(&answer).unwrap();
    let path = object_store::path::Path::from(format!("results/{}", spec.id));
    gateway.submit(&spec).await.unwrap();
    object_store::ObjectStoreExt::put(&*store, &path, json.clone().into()).await.unwrap();
    let worker = worker(url, &store).await;
    let mut consumer = consumer(&worker, &name).await;
    let results = Foreign::connect(url).await;
    let results = results.tap("hutch.results", &format!("{name}.#")).await;
    let last = job(&name);
    gateway.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id);
    assert_eq!(result(&gateway, spec.id).await, answer);
    let told = until("the result", || async { results.seen().into_iter().next() }).await;
    assert_eq!(told.body, json, "byte by byte");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_is_deleted_comes_back() {
    let (url, store, directory) = (Broker::shared().url(), memory(), tempfile::tempdir().unwrap());
    let gateway = gateway(url, directory.path(), &store).await;
    let worker = worker(url, &store).await;
    let name = unique("deleted");
    let mut consumer = consumer(&worker, &name).await;
    gateway.submit(&job(&name)).await.unwrap();
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "");
    consumer.finish(lease, answer).await.unwrap();
    let taking = tokio::spawn(async move { take(&mut consumer).await.job.id });
    let channel = Foreign::connect(url).await.channel().await;
    let queue = format!("hutch.jobs.{name}");
    let begin = Instant::now();
    channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    let spec = job(&name);
    gateway.submit(&spec).await.unwrap();
    assert_eq!(taking.await.unwrap(), spec.id);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

/// The job is held, neither lost nor told without a record, until the store is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_fails_is_waited_out() {
    let (url, directory) = (Broker::shared().url(), tempfile::tempdir().unwrap());
    let flaky = Arc::new(Flaky::new(InMemory::new()));
    let store: Arc<dyn ObjectStore> = flaky.clone();
    let gateway = gateway(url, directory.path(), &store).await;
    let worker = worker(url, &store).await;
    let name = unique("store");
    let (one, two) = (job(&name), job(&name));
    gateway.submit(&one).await.unwrap();
    gateway.submit(&two).await.unwrap();
    let mut consumer = consumer(&worker, &name).await;
    let lease = take(&mut consumer).await;
    flaky.fail(true);
    let answer = success(&lease, "");
    let ended = Arc::new(AtomicBool::new(false));
    let ending = Arc::clone(&ended);
    let finishing = tokio::spawn(async move {
        let finished = consumer.finish(lease, answer).await.unwrap();
        ending.store(true, Ordering::Relaxed);
        (consumer, finished)
    });
    until("the store to be asked in vain", || async { (flaky.failures() > 3).then_some(()) }).await;
    assert!(!ended.load(Ordering::Relaxed));
    flaky.fail(false);
    let (mut consumer, finished) = soon("the end", finishing).await.unwrap();
    assert_eq!(finished, Finished::Recorded);
    assert_eq!(result(&gateway, one.id).await.status, Status::Succeeded);

    // And the same when a job is taken.
    flaky.fail(true);
    let before = flaky.failures();
    let taking = tokio::spawn(async move { take(&mut consumer).await });
    until("the store to be asked in vain", || async { (flaky.failures() > before + 3).then_some(()) }).await;
    flaky.fail(false);
    let lease = soon("the job", taking).await.unwrap();
    assert_eq!((lease.job.id, lease.attempt), (two.id, 1));
}

/// In an alarm the broker takes no messages. What was sent meanwhile may arrive later, and twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_is_waited_out() {
    let broker = tokio::task::block_in_place(Broker::start);
    let (url, store, directory) = (broker.url(), memory(), tempfile::tempdir().unwrap());
    let gateway = gateway(&url, directory.path(), &store).await;
    let worker = worker(&url, &store).await;
    let name = unique("alarm");
    let spec = job(&name);
    gateway.submit(&spec).await.unwrap();
    let mut consumer = consumer(&worker, &name).await;
    let lease = take(&mut consumer).await;
    let alarm = |level: &str| {
        tokio::task::block_in_place(|| broker.ctl(&["set_vm_memory_high_watermark", level]));
    };
    alarm("0.00001");
    let refused = gateway.submit(&job(&name)).await.unwrap_err();
    assert!(matches!(refused, QueueError::Unavailable(_)), "{refused}");
    let answer = success(&lease, "in an alarm");
    let finishing = tokio::spawn(async move { consumer.finish(lease, answer).await.unwrap() });
    // Longer than one confirm may take, so that the same message is sent again.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!finishing.is_finished());
    alarm("0.6");
    assert_eq!(soon("the end", finishing).await.unwrap(), Finished::Recorded);
    assert_eq!(result(&gateway, spec.id).await.stdout.data, b"in an alarm");
    let told = drain_results(&url, &name).await;
    assert!(told[&spec.id].windows(2).all(|pair| pair[0] == pair[1]));
}

/// A network that swallows everything is noticed by the heartbeat that does not come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_is_noticed() {
    let (store, directory) = (memory(), tempfile::tempdir().unwrap());
    let (proxy, url) = Proxy::before(Broker::shared().url()).await.unwrap();
    let gateway = gateway(Broker::shared().url(), directory.path(), &store).await;
    let worker = worker(&format!("{url}?heartbeat=2"), &store).await;
    let name = unique("hole");
    let mut consumer = consumer(&worker, &name).await;
    let spec = job(&name);
    gateway.submit(&spec).await.unwrap();
    let lease = take(&mut consumer).await;
    proxy.swallow(true);
    let begin = Instant::now();
    until("the loss to be noticed", || async { (!worker.connected()).then_some(()) }).await;
    // Twice the heartbeat, and a moment.
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    proxy.swallow(false);
    let answer = success(&lease, "from the hole");
    assert_eq!(soon("the end", consumer.finish(lease, answer)).await.unwrap(), Finished::Recorded);
    assert_eq!(result(&gateway, spec.id).await.stdout.data, b"from the hole");
}

/// A drain under load: slots stop at whatever moment, and no attempt is spent by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_spends_no_attempts() {
    const JOBS: usize = 200;
    let (url, store, directory) = (Broker::shared().url(), memory(), tempfile::tempdir().unwrap());
    let gateway = gateway(url, directory.path(), &store).await;
    let name = unique("drain");
    let specs: Vec<_> = (0..JOBS)
        .map(|_| {
            let mut spec = job(&name);
            spec.max_attempts = 1;
            spec
        })
        .collect();
    for spec in &specs {
        gateway.submit(spec).await.unwrap();
    }
    let mut done = 0;
    while done < JOBS {
        // Each worker does a few jobs, gives one back, and goes.
        let worker = worker(url, &store).await;
        let mut slots = JoinSet::new();
        for _ in 0..3 {
            let mut consumer = consumer(&worker, &name).await;
            slots.spawn(async move {
                let mut finished = 0;
                while finished < 8
                    && let Ok(lease) = tokio::time::timeout(Duration::from_secs(2), consumer.take()).await
                {
                    let lease = lease.unwrap();
                    assert_eq!(lease.attempt, 1);
                    let answer = success(&lease, "");
                    consumer.finish(lease, answer).await.unwrap();
                    finished += 1;
                }
                if let Ok(lease) = tokio::time::timeout(Duration::from_secs(2), consumer.take()).await {
                    consumer.give_back(lease.unwrap(), GiveBack::Unspent).await.unwrap();
                }
                finished
            });
        }
        while let Some(finished) = slots.join_next().await {
            done += finished.unwrap();
        }
        worker.close().await;
    }
    for spec in &specs {
        let answer = result(&gateway, spec.id).await;
        assert_eq!((answer.status, answer.attempt), (Status::Succeeded, 1), "{}", answer.message);
        view(&gateway, spec.id, JobState::Finished).await;
    }
}

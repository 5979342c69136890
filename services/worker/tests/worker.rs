//! A worker on an embedded queue, with an engine that only pretends to run programs.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hutch_layers::{BlobStore, Hasher};
use hutch_proto::{
    Archive, Content, EventKind, JobId, JobResult, JobSpec, JobState, Outputs, Reason, Status, Timestamp,
    Usage,
};
use hutch_queue::Queue;
use hutch_queue::embedded::{EmbeddedOptions, EmbeddedQueue};
use hutch_sandbox::{Durations, Observer, Order, Report, SlotGauges, Stream};
use hutch_worker::{Runner, Worker, WorkerConfig, WorkerError};
use prometheus::TextEncoder;
use serde_json::json;

/// Does what the job's first argument says.
#[derive(Default)]
struct Actor {
    calls: AtomicU32,
    stdin: Mutex<BTreeMap<JobId, Content>>,
}

fn report(status: Status, reason: Option<Reason>) -> Report {
    Report {
        status,
        reason,
        message: reason.map(|reason| reason.to_string()).unwrap_or_default(),
        limit: None,
        exit_code: None,
        signal: None,
        stdout: hutch_proto::Captured::default(),
        stderr: hutch_proto::Captured::default(),
        usage: Usage { wall_time_ms: 5, memory_peak_bytes: 3 << 20, ..Usage::default() },
        outputs: Outputs::default(),
        archive: None,
        steps: Vec::new(),
        started_at: Some(Timestamp::now()),
        finished_at: Timestamp::now(),
        durations: Durations { setup_us: 900, ..Durations::default() },
        remains: None,
    }
}

#[async_trait]
impl Runner for Actor {
    async fn run(&self, order: Order, observer: &dyn Observer) -> Report {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        if let Some(stdin) = order.job.stdin.clone() {
            self.stdin.lock().expect("lock").insert(order.job.id, stdin);
        }
        observer.started();
        let command = order.job.command.clone().unwrap_or_default();
        match command[0].as_str() {
            "say" => {
                for piece in ["hé".as_bytes(), b"llo"].concat().chunks(2) {
                    observer.output("main", Stream::Stdout, piece);
                }
                observer.usage(&Usage::default());
            }
            "leave" => {
                let mut file = tempfile::tempfile().expect("file");
                file.write_all(b"an archive").expect("write");
                let mut report = report(Status::Succeeded, None);
                report.outputs.archive = Some(Archive { blob: Hasher::digest_of(b"an archive"), bytes: 10 });
                report.archive = Some(file);
                return report;
            }
            "panic" => panic!("a bug"),
            "break" => return report(Status::InfraError, Some(Reason::HostError)),
            "break-once" if call == 0 => return report(Status::InfraError, Some(Reason::HostError)),
            "hang" => {
                order.cancel.cancelled().await;
                return report(Status::Cancelled, Some(Reason::Requested));
            }
            "nap" => tokio::time::sleep(Duration::from_millis(300)).await,
            _ => {}
        }
        report(Status::Succeeded, None)
    }

    fn gauges(&self) -> Vec<SlotGauges> {
        let mut gauges = SlotGauges { slot: 0, memory_bytes: 7, cpu_us: 2_000_000, ..SlotGauges::default() };
        gauges.pressure_us[0] = Some(("memory", "some", 500_000));
        vec![gauges]
    }

    fn reaped(&self) -> u64 {
        2
    }
}

struct House {
    queue: Arc<dyn Queue>,
    blobs: BlobStore,
    actor: Arc<Actor>,
    worker: Arc<Worker>,
    running: tokio::task::JoinHandle<Result<(), WorkerError>>,
    _directory: tempfile::TempDir,
}

impl House {
    async fn new(change: impl FnOnce(&mut WorkerConfig)) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("queue.db");
        let queue: Arc<dyn Queue> =
            Arc::new(EmbeddedQueue::open(&file, EmbeddedOptions::default()).expect("queue"));
        let blobs = BlobStore::in_directory(directory.path()).expect("store");
        let mut config = WorkerConfig::new("w-test".to_owned(), directory.path().to_owned());
        config.metric_labels = vec!["tenant".to_owned()];
        change(&mut config);
        let actor = Arc::new(Actor::default());
        let runner: Arc<dyn Runner> = actor.clone();
        let worker = Worker::new(runner, Arc::clone(&queue), blobs.clone(), config).expect("worker");
        let worker = Arc::new(worker);
        let running = tokio::spawn({
            let worker = Arc::clone(&worker);
            async move { worker.run().await }
        });
        Self { queue, blobs, actor, worker, running, _directory: directory }
    }

    async fn submit(&self, action: &str, more: serde_json::Value) -> JobId {
        let mut spec = json!({"layers": ["host"], "command": [action], "labels": {"tenant": "acme"}});
        for (name, value) in more.as_object().expect("object") {
            spec[name] = value.clone();
        }
        let job = JobSpec::parse(spec.to_string().as_bytes()).expect("spec");
        self.queue.submit(&job).await.expect("submitted");
        job.id
    }

    async fn state(&self, id: JobId) -> JobState {
        self.queue.get(id).await.expect("get").expect("known").state
    }

    async fn result(&self, id: JobId) -> JobResult {
        for _ in 0..500 {
            if let Some(result) = self.queue.get(id).await.expect("get").expect("known").result {
                return result;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no result of {id}");
    }

    async fn until(&self, id: JobId, wanted: JobState) {
        for _ in 0..500 {
            if self.state(id).await == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{id} is never {wanted}");
    }

    fn metrics(&self) -> String {
        TextEncoder::new().encode_to_string(&self.worker.registry().gather()).expect("metrics")
    }
}

#[tokio::test]
async fn a_job_is_run_and_its_events_are_told_in_order() {
    let house = House::new(|_| {}).await;
    let mut events = house.queue.subscribe();
    let id = house.submit("say", json!({})).await;
    let result = house.result(id).await;
    assert_eq!((result.status, result.attempt, result.worker.as_str()), (Status::Succeeded, 1, "w-test"));
    let mut kinds = Vec::new();
    let mut text = String::new();
    loop {
        let event = events.recv().await.expect("event");
        assert_eq!((event.id, event.attempt, event.seq), (id, 1, kinds.len() as u64 + 1));
        kinds.push(event.kind.name());
        match event.kind {
            EventKind::Stdout(chunk) => text.push_str(&chunk.text.expect("no character is cut in two")),
            EventKind::Finished { .. } => break,
            _ => {}
        }
    }
    assert_eq!(text, "héllo");
    kinds.dedup();
    assert_eq!(kinds, ["started", "stdout", "usage", "finished"]);
}

#[tokio::test]
async fn blobs_come_in_and_archives_go_out() {
    let house = House::new(|_| {}).await;
    let stored = house.blobs.put(bytes::Bytes::from_static(b"input")).await.expect("put");
    let id = house.submit("leave", json!({"stdin": {"blob": stored.digest}})).await;
    let archive = house.result(id).await.outputs.archive.expect("archive");
    assert_eq!(house.actor.stdin.lock().expect("lock")[&id], Content::inline("input"));
    assert_eq!(&house.blobs.get(&archive.blob, 10).await.expect("kept")[..], b"an archive");
    let missing = Hasher::digest_of(b"missing");
    let id = house.submit("say", json!({"stdin": {"blob": missing}})).await;
    let result = house.result(id).await;
    assert_eq!((result.status, result.reason), (Status::Rejected, Some(Reason::SpecInvalid)));
    assert!(result.message.contains("stdin") && result.message.contains(&missing.to_string()));
}

#[tokio::test]
async fn a_fault_of_the_host_spends_an_attempt_and_no_more() {
    let house = House::new(|_| {}).await;
    let id = house.submit("break-once", json!({})).await;
    let result = house.result(id).await;
    assert_eq!((result.status, result.attempt), (Status::Succeeded, 2));
    let id = house.submit("break", json!({"max_attempts": 2})).await;
    let result = house.result(id).await;
    assert_eq!((result.status, result.reason), (Status::InfraError, Some(Reason::HostError)));
    let metrics = house.metrics();
    assert!(metrics.contains(r#"hutch_faults_total{reason="host_error"} 3"#), "{metrics}");
    assert!(metrics.contains(
        r#"hutch_jobs_total{queue="default",reason="host_error",status="infra_error",tenant="acme"} 1"#
    ));
}

#[tokio::test]
async fn a_panic_ends_its_job_and_the_slot_lives_on() {
    let house = House::new(|_| {}).await;
    let id = house.submit("panic", json!({"max_attempts": 1})).await;
    let result = house.result(id).await;
    assert_eq!(result.reason, Some(Reason::HostError));
    assert!(result.message.contains("a bug"), "{}", result.message);
    let id = house.submit("say", json!({})).await;
    assert_eq!(house.result(id).await.status, Status::Succeeded);
    assert!(house.metrics().contains("hutch_jobs_running 0"));
}

#[tokio::test]
async fn a_running_job_can_be_called_off() {
    let house = House::new(|_| {}).await;
    let id = house.submit("hang", json!({})).await;
    house.until(id, JobState::Running).await;
    house.queue.cancel(id).await.expect("cancelled");
    let result = house.result(id).await;
    assert_eq!((result.status, result.reason), (Status::Cancelled, Some(Reason::Requested)));
}

#[tokio::test]
async fn a_drain_lets_jobs_end_and_gives_the_rest_back() {
    let house = House::new(|config| {
        config.slots = 2;
        config.drain_grace = Duration::from_millis(600);
    })
    .await;
    let short = house.submit("nap", json!({})).await;
    let long = house.submit("hang", json!({})).await;
    house.until(short, JobState::Running).await;
    house.until(long, JobState::Running).await;
    house.worker.drain().signal();
    assert!(house.worker.not_ready().expect("not ready").contains("draining"));
    let later = house.submit("say", json!({})).await;
    house.running.await.expect("ended").expect("well");
    let view = |id| house.queue.get(id);
    assert_eq!(
        view(short).await.expect("get").expect("known").result.expect("result").status,
        Status::Succeeded
    );
    for id in [long, later] {
        assert_eq!(view(id).await.expect("get").expect("known").state, JobState::Queued);
    }
}

#[tokio::test]
async fn a_second_signal_hurries() {
    let house = House::new(|config| config.drain_grace = Duration::from_secs(60)).await;
    let id = house.submit("hang", json!({})).await;
    house.until(id, JobState::Running).await;
    house.worker.drain().signal();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!house.running.is_finished(), "within its grace");
    house.worker.drain().signal();
    let ended = tokio::time::timeout(Duration::from_secs(5), house.running).await;
    ended.expect("at once").expect("ended").expect("well");
    let view = house.queue.get(id).await.expect("get").expect("known");
    assert_eq!(view.state, JobState::Queued, "no attempt is spent, no result is made");
}

#[tokio::test]
async fn every_metric_of_the_contract_is_there() {
    let house = House::new(|_| {}).await;
    let id = house.submit("say", json!({})).await;
    house.result(id).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let metrics = house.metrics();
    for row in [
        r#"hutch_jobs_total{queue="default",reason="",status="succeeded",tenant="acme"} 1"#,
        "hutch_jobs_running 0",
        "hutch_slots 1",
        "hutch_job_queue_seconds_count 1",
        r#"hutch_job_wall_seconds_bucket{le="0.005"} 1"#,
        "hutch_job_cpu_seconds_count 1",
        r#"hutch_job_memory_peak_bytes_bucket{le="4194304"} 1"#,
        r#"hutch_sandbox_setup_seconds_bucket{le="0.001"} 1"#,
        "hutch_sandbox_teardown_seconds_count 1",
        r#"hutch_cgroup_memory_bytes{slot="0"} 7"#,
        r#"hutch_cgroup_memory_limit_bytes{slot="0"} 0"#,
        r#"hutch_cgroup_cpu_seconds_total{slot="0"} 2"#,
        r#"hutch_cgroup_cpu_throttled_seconds_total{slot="0"} 0"#,
        r#"hutch_cgroup_pids{slot="0"} 0"#,
        r#"hutch_cgroup_io_bytes_total{op="read",slot="0"} 0"#,
        r#"hutch_cgroup_pressure_seconds_total{kind="some",resource="memory",slot="0"} 0.5"#,
        "hutch_broker_connected 1",
        "hutch_broker_reconnects_total 0",
        "hutch_redeliveries_total 0",
        "hutch_layer_cache_hits_total 0",
        "hutch_layer_cache_misses_total 0",
        "hutch_layer_store_bytes 0",
        "hutch_reaped_sandboxes_total 2",
        r#"hutch_build_info{version="0.1.0"} 1"#,
    ] {
        assert!(metrics.contains(&format!("{row}\n")), "{row}\n{metrics}");
    }
    assert!(!house.metrics().contains(&id.to_string()), "a job's id is never a label");
    let families = metrics.lines().filter(|line| line.starts_with("# TYPE")).count();
    assert_eq!(families, metrics.lines().filter(|line| line.starts_with("# HELP")).count());
}

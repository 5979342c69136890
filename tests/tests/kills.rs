//! Workers that are killed with -9, again and again, in the middle of their jobs: every job has one result, and
//! nothing of any sandbox is left.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use hutch_tests::broker::Broker;
use hutch_tests::house::{House, Served};
use lapin::options::BasicGetOptions;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const JOBS: usize = 200;
const KILLS: usize = 10;
/// How soon after a kill nothing may be left, on a machine with much to do.
const SOON: Duration = Duration::from_secs(60);
/// Longer than all jobs take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Two hundred jobs; each says who it is, and then takes a while.
fn jobs() -> Vec<Value> {
    let script = "echo \"$ME\"; sleep 0.15; (sleep 100 &); echo done";
    (0..JOBS)
        .map(|number| {
            json!({
                "id": uuid::Uuid::now_v7(), "layers": ["host"], "command": ["sh", "-c", script],
                "env": {"ME": format!("job {number}")}, "max_attempts": 2 * KILLS,
            })
        })
        .collect()
}

/// The results that a gateway shows, by id, each as its whole text.
fn results(gateway: &Served) -> BTreeMap<String, String> {
    let page = gateway.get_json("/v1/jobs?limit=500&status=finished");
    let jobs = page["jobs"].as_array().expect("jobs");
    jobs.iter().map(|job| (job["id"].as_str().expect("id").to_owned(), job["result"].to_string())).collect()
}

fn wait_for_results(gateway: &Served, count: usize) -> BTreeMap<String, String> {
    let begun = Instant::now();
    loop {
        let results = results(gateway);
        if results.len() >= count {
            return results;
        }
        assert!(begun.elapsed() < PATIENCE, "{} of {count} results after {PATIENCE:?}", results.len());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Kills whoever runs the sandboxes, and sees that nothing of them is left.
fn kill(worker: Served) {
    let process = worker.process();
    let all = process.descendants();
    assert!(!all.is_empty(), "no launcher");
    // The engine's, a child of the worker.
    let homes = || all.iter().map(|one| one.cgroup_homes().len()).sum::<usize>();
    assert!(homes() > 0, "no cgroups: who runs the jobs?");
    worker.signal(Signal::SIGKILL);
    drop(worker);
    let begun = Instant::now();
    let left = || all.iter().filter(|one| one.is_alive()).count() + homes();
    while left() > 0 {
        assert!(begun.elapsed() < SOON, "{} processes and cgroups are left after a kill", left());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Every job of these succeeded, and said what it should.
fn check(sent: &[Value], results: &BTreeMap<String, String>) {
    let ids: BTreeSet<&str> = sent.iter().map(|job| job["id"].as_str().expect("id")).collect();
    assert_eq!(results.keys().map(String::as_str).collect::<BTreeSet<_>>(), ids, "one result for each job");
    let mut again = 0;
    for job in sent {
        let result = &results[job["id"].as_str().expect("id")];
        let result: Value = serde_json::from_str(result).expect("a result");
        assert_eq!(result["status"], "succeeded", "{result}");
        let said = format!("{}\ndone\n", job["env"]["ME"].as_str().expect("name"));
        assert_eq!(result["stdout"]["text"], said, "{result}");
        again += usize::from(result["attempt"].as_u64() > Some(1));
    }
    eprintln!("{JOBS} jobs, {KILLS} kills, {again} jobs were run again");
    assert!(again > 0, "no kill met a job that ran");
}

#[test]
fn killed_on_the_embedded_queue() {
    let Some(house) = House::with_sandboxes() else { return };
    let sent = jobs();
    let start = || house.serve(&["up", "--slots", "4"]);
    let mut up = start();
    let answers = up.post("/v1/jobs/batch", &Value::from(sent.clone()));
    assert_eq!(answers.as_array().map(Vec::len), Some(JOBS), "{answers}");
    let mut seen = BTreeMap::new();
    for round in 1..=KILLS {
        seen.extend(wait_for_results(&up, round * JOBS / (KILLS + 2)));
        kill(up);
        up = start();
    }
    let results = wait_for_results(&up, JOBS);
    for (id, result) in seen {
        assert_eq!(results[&id], result, "a result that was shown has changed");
    }
    check(&sent, &results);
}

#[test]
fn killed_on_rabbitmq() {
    let Some(house) = House::with_sandboxes() else { return };
    let broker = Broker::start();
    let (url, store) = (broker.url(), format!("file://{}", house.path("store").display()));
    let data = |name: &str| house.path(name).display().to_string();
    let gateway = house.serve(&["gateway", "--broker", &url, "--store", &store, "--data", &data("gateway")]);
    let start = || {
        let arguments =
            ["worker", "--broker", &url, "--store", &store, "--data", &data("worker"), "--slots", "4"];
        house.serve_with(&arguments, &[("HUTCH__WORKER__ALLOW_HOST_LAYER", "true")])
    };
    let mut worker = start();
    let sent = jobs();
    let answers = gateway.post("/v1/jobs/batch", &Value::from(sent.clone()));
    assert_eq!(answers.as_array().map(Vec::len), Some(JOBS), "{answers}");
    for round in 1..=KILLS {
        let _ = wait_for_results(&gateway, round * JOBS / (KILLS + 2));
        kill(worker);
        worker = start();
    }
    let results = wait_for_results(&gateway, JOBS);
    check(&sent, &results);
    worker.signal(Signal::SIGTERM);
    assert_eq!(worker.end().0, 0);
    one_result_each(&url, &sent);
}

/// What came to the queue for results has one result for each job; a message may have come twice.
fn one_result_each(url: &str, sent: &[Value]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let mut told: BTreeMap<String, BTreeSet<Vec<u8>>> = BTreeMap::new();
    runtime.block_on(async {
        let connection = lapin::Connection::connect(url, Default::default()).await.expect("connection");
        let channel = connection.create_channel().await.expect("channel");
        let take = || channel.basic_get("hutch.results".into(), BasicGetOptions { no_ack: true });
        while let Some(message) = take().await.expect("get") {
            let result: Value = serde_json::from_slice(&message.data).expect("a result");
            let id = result["id"].as_str().expect("id").to_owned();
            told.entry(id).or_default().insert(message.delivery.data);
        }
    });
    assert_eq!(told.len(), sent.len());
    for job in sent {
        let id = job["id"].as_str().expect("id");
        assert_eq!(told[id].len(), 1, "{id} has different results");
    }
}

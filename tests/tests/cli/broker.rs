//! `hutch worker` and `hutch gateway` over a RabbitMQ of their own.

use hutch_tests::broker::Broker;
use hutch_tests::house::House;
use nix::sys::signal::Signal;
use serde_json::Value;

#[test]
fn a_job_goes_over_the_broker_and_survives_its_restart() {
    let Some(house) = House::with_sandboxes() else { return };
    let mut broker = Broker::start();
    let url = broker.url();
    let store = format!("file://{}", house.path("store").display());
    let (worker_data, gateway_data) = (house.path("w"), house.path("g"));
    let [worker_data, gateway_data] = [&worker_data, &gateway_data].map(|path| path.to_str().expect("utf-8"));
    let worker =
        house.serve(&["worker", "--broker", &url, "--store", &store, "--data", worker_data, "--slots", "2"]);
    let gateway = house.serve(&["gateway", "--broker", &url, "--store", &store, "--data", gateway_data]);
    let client = |arguments: &[&str]| {
        let (command, rest) = arguments.split_first().expect("command");
        house.hutch(&[&[*command, "--url", gateway.url.as_str()], rest].concat())
    };
    let job = r#"{"layers": ["dir:/usr"], "command": ["true"]}"#;
    let refused = client(&["submit", "--wait", &house.file("dir.json", job)]);
    assert_eq!(refused.json()["status"], "rejected", "{refused:?}");

    // A worker allows the host layer only if it is told to.
    let spec = house.file("job.json", r#"{"layers": ["host"], "command": ["echo", "far away"]}"#);
    let refused = client(&["submit", "--wait", &spec]);
    assert_eq!(refused.json()["reason"], "spec_invalid", "{refused:?}");
    worker.signal(Signal::SIGTERM);
    assert_eq!(worker.end().0, 0);
    let worker = house.serve_with(
        &["worker", "--broker", &url, "--store", &store, "--data", worker_data],
        &[("HUTCH__WORKER__ALLOW_HOST_LAYER", "true")],
    );
    let done = client(&["submit", "--follow", &spec]);
    assert_eq!((done.code, done.stdout.as_str()), (0, "far away\n"), "{done:?}");

    broker.restart();
    let done = client(&["submit", "--wait", &spec]);
    assert_eq!((done.code, &done.json()["stdout"]["text"]), (0, &Value::from("far away\n")), "{done:?}");
    for (served, row) in [(&worker, "hutch_jobs_total{"), (&gateway, "hutch_queue_depth{")] {
        let metrics = served.get("/metrics");
        assert!(metrics.contains(row), "{row}\n{metrics}");
    }
    assert!(worker.get("/metrics").contains("hutch_broker_connected 1"));
    worker.signal(Signal::SIGTERM);
    gateway.signal(Signal::SIGTERM);
    assert_eq!((worker.end().0, gateway.end().0), (0, 0));
}

//! `hutch up`, and the commands that talk to it.

use nix::sys::signal::Signal;
use serde_json::Value;

use hutch_tests::house::{Done, House, Served};

use crate::first_line;

fn client(house: &House, served: &Served, arguments: &[&str]) -> Done {
    let (command, rest) = arguments.split_first().expect("command");
    house.hutch(&[&[*command, "--url", served.url.as_str()], rest].concat())
}

const JOB: &str = r#"{"layers": ["host"], "cwd": "/box", "labels": {"tenant": "acme"},
    "command": ["sh", "-c", "echo out; echo err >&2; mkdir d; echo kept > d/f; exit 4"],
    "outputs": {"paths": ["/box/d/**"]}}"#;

#[test]
fn a_job_goes_all_the_way() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up", "--slots", "2"]);
    let spec = house.file("job.json", JOB);
    let run = |arguments: &[&str]| client(&house, &served, arguments);

    let done = run(&["submit", "--wait", &spec]);
    assert_eq!((done.code, &done.json()["reason"]), (1, &Value::from("nonzero_exit")), "{done:?}");
    let done = run(&["submit", "--follow", &spec]);
    assert_eq!((done.code, done.stdout.as_str()), (4, "out\n"), "{done:?}");
    assert!(done.stderr.contains("err\n") && done.stderr.contains("failed"), "{done:?}");

    let long = r#"{"layers": ["host"], "command": ["head", "-c", "1500000", "/dev/zero"]}"#;
    let done = run(&["submit", "--follow", &house.file("long.json", long)]);
    assert!(done.stderr.contains("1048576 of 1500000 bytes") && done.stderr.contains("limits.stdout_bytes"));

    let id = run(&["submit", &spec]).stdout.trim().to_owned();
    let logs = run(&["logs", "-f", &id]);
    assert_eq!((logs.code, logs.stdout.as_str(), logs.stderr.as_str()), (0, "out\n", "err\n"));
    assert_eq!(run(&["logs", &id]).stdout, "out\n");
    let status = run(&["status", &id]);
    assert!(status.stdout.contains("failed") && status.stdout.contains("tenant=acme"), "{status:?}");
    assert_eq!(run(&["status", "--json", &id]).json()["state"], "finished");
    assert!(run(&["outputs", &id]).stdout.contains("/box/d/f"));
    let extracted = run(&["outputs", "--extract", "here", &id]);
    assert_eq!(extracted.code, 0, "{extracted:?}");
    assert_eq!(std::fs::read_to_string(house.path("here/box/d/f")).expect("kept"), "kept\n");

    let metrics = served.get("/metrics");
    for row in ["hutch_jobs_total{", "hutch_http_requests_total{", "hutch_slots 2"] {
        assert!(metrics.contains(row), "{row}\n{metrics}");
    }
    assert_eq!(served.get("/readyz"), "ready\n");
    served.signal(Signal::SIGTERM);
    let (code, said) = served.end();
    assert_eq!((code, said.as_str()), (0, ""));
}

#[test]
fn a_running_job_is_cancelled() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up"]);
    let spec = house.file("job.json", r#"{"layers": ["host"], "command": ["sleep", "60"]}"#);
    let id = client(&house, &served, &["submit", &spec]).stdout.trim().to_owned();
    assert_eq!(client(&house, &served, &["cancel", &id]).code, 0);
    let again = client(&house, &served, &["submit", "--wait", &spec_with(&house, &id)]);
    assert_eq!(again.json()["reason"], "requested", "{again:?}");
    let unknown = client(&house, &served, &["status", "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34"]);
    assert!(unknown.code == 1 && unknown.stderr.contains("no job"), "{unknown:?}");
}

/// The same job again, by its id.
fn spec_with(house: &House, id: &str) -> String {
    let spec = format!(r#"{{"id": "{id}", "layers": ["host"], "command": ["sleep", "60"]}}"#);
    house.file("again.json", &spec)
}

#[test]
fn what_was_accepted_survives_a_kill() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up", "--slots", "1"]);
    let long = house.file("long.json", r#"{"layers": ["host"], "command": ["sleep", "2"]}"#);
    let short = house.file("short.json", r#"{"layers": ["host"], "command": ["echo", "late"]}"#);
    client(&house, &served, &["submit", &long]);
    let id = client(&house, &served, &["submit", &short]).stdout.trim().to_owned();
    served.signal(Signal::SIGKILL);
    drop(served);
    let served = house.serve(&["up", "--slots", "1"]);
    let logs = client(&house, &served, &["logs", "-f", &id]);
    assert_eq!(logs.stdout, "late\n", "{logs:?}");
}

#[test]
fn a_broker_that_is_not_used_is_said_so() {
    let Some(house) = House::with_sandboxes() else { return };
    let mut command = house.command(&["up", "--listen", "127.0.0.1:0"]);
    command.env("HUTCH__BROKER__URL", "amqp://127.0.0.1:1");
    let said = first_line(command);
    assert!(said.contains("broker.url is set and not used"), "{said}");
}

#[test]
fn two_owners_of_one_directory_are_refused() {
    let Some(house) = House::with_sandboxes() else { return };
    let _served = house.serve(&["up"]);
    let done = house.hutch(&["up", "--listen", "127.0.0.1:0"]);
    assert_eq!(done.code, 1, "{done:?}");
    assert!(done.stderr.contains("queue.db"), "{done:?}");
}

#[test]
fn the_demo_shows_four_verdicts() {
    let Some(house) = House::with_sandboxes() else { return };
    let mut served = house.serve(&["up", "--demo"]);
    let lines: Vec<String> = served.stdout().take(11).collect();
    let text = lines.join("\n");
    for word in
        ["succeeded", "limit_exceeded (memory)", "limit_exceeded (wall_time)", "Look at them", &served.url]
    {
        assert!(text.contains(word), "{word}\n{text}");
    }
    assert_eq!(text.matches("succeeded").count(), 2, "{text}");
    served.signal(Signal::SIGINT);
    assert_eq!(served.end().0, 0);
}

#[test]
fn a_worker_alone_answers_for_itself() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["worker", "--slots", "3", "--queue", "fast", "--queue", "slow"]);
    assert!(served.ready.contains("3 slots on fast, slow"), "{}", served.ready);
    assert_eq!((served.get("/healthz"), served.get("/readyz")), ("ok\n".into(), "ready\n".into()));
    assert!(served.get("/metrics").contains("hutch_slots 3"));
    served.signal(Signal::SIGTERM);
    assert_eq!(served.end(), (0, String::new()));
}

#[test]
fn a_wrong_spec_is_refused_before_it_is_sent() {
    let house = House::new();
    let served = house.serve(&["gateway"]);
    let spec = house.file("job.json", r#"{"layers": []}"#);
    let done = client(&house, &served, &["submit", &spec]);
    assert!(done.code == 1 && done.stderr.contains("layers: at least one"), "{done:?}");
    assert_eq!(served.get("/healthz"), "ok\n");
}

//! The README's first jobs, taken from its text and done as it says.

use std::process::Command;

use hutch_tests::broker::Broker;
use hutch_tests::house::{Done, House};
use lapin::options::BasicGetOptions;
use serde_json::Value;

const README: &str = include_str!("../../../README.md");

/// The block of code in this language that has this in it.
fn block(language: &str, with: &str) -> &'static str {
    let begin = format!("```{language}\n");
    let blocks = README.split(begin.as_str()).skip(1).filter_map(|rest| rest.split("```").next());
    let found: Vec<_> = blocks.filter(|block| block.contains(with)).collect();
    let [one] = found[..] else { panic!("{} blocks of {language} have `{with}`", found.len()) };
    one
}

/// Runs a script in which `hutch` is the binary under test.
fn shell(house: &House, script: &str, variables: &[(&str, &str)]) -> Done {
    let mut command = Command::new("sh");
    let bin = hutch_tests::hutch::binary().parent().expect("directory").display().to_string();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap_or_default());
    command.args(["-ec", script]).current_dir(house.path(".")).env("PATH", path);
    command.env("HUTCH__DATA_DIR", house.path("data")).envs(variables.iter().copied());
    command.output().expect("sh").into()
}

#[test]
fn here_and_now() {
    let Some(house) = House::with_sandboxes() else { return };
    let done = shell(&house, block("sh", "hutch run --memory"), &[]);
    assert_eq!((done.code, done.stdout.as_str()), (0, "42\n"), "{done:?}");
}

#[test]
fn images_in_layers_out() {
    let Some(house) = House::with_sandboxes() else { return };
    let root =
        "mkdir -p root/bin && cp /bin/busybox root/bin/sh && tar -C root -cf - . | zstd -q > rootfs.tar.zst";
    assert_eq!(shell(&house, root, &[]).code, 0);
    let done = shell(&house, block("sh", "hutch layer import"), &[]);
    assert_eq!((done.code, done.stdout.as_str()), (0, "image:docker.io/my/base:1\nhello\n"), "{done:?}");
}

#[test]
fn over_http() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up"]);
    let done = shell(&house, block("sh", "hutch submit"), &[("HUTCH_URL", &served.url)]);
    assert_eq!((done.code, &done.json()["stdout"]["text"]), (0, &Value::from("3\n")), "{done:?}");
}

#[test]
fn over_rabbitmq_from_python() {
    let Some(house) = House::with_sandboxes() else { return };
    let broker = Broker::shared();
    // A worker of a queue of its own, since others use the same broker.
    let queue = format!("readme-{}", std::process::id());
    let _worker = house.serve_with(
        &["worker", "--broker", broker.url(), "--queue", &queue],
        &[("HUTCH__WORKER__ALLOW_HOST_LAYER", "true")],
    );
    let url = format!("{}?heartbeat=30", broker.url());
    let script = block("python", "import pika")
        .replace("pika.ConnectionParameters(\"localhost\")", &format!("pika.URLParameters(\"{url}\")"))
        .replace("routing_key=\"default\"", &format!("routing_key=\"{queue}\""));
    assert!(script.contains(&url) && script.contains(&queue), "the README's client has changed: {script}");
    let script = house.file("client.py", &format!("{script}\nprint(job)\n"));
    let done = Done::from(Command::new("/usr/bin/python3").arg(script).output().expect("python3"));
    assert_eq!(done.stdout.lines().next(), Some("succeeded hello"), "{done:?}");
    let id = done.stdout.lines().last().unwrap_or_default();
    let told = results_of(broker.url(), id);
    assert_eq!(told.len(), 1, "one message at hutch.results: {told:?}");
    assert_eq!(told[0]["stdout"]["text"], "hello\n", "{told:?}");
}

/// What came to `hutch.results` for a job; everything is left there for others.
fn results_of(url: &str, id: &str) -> Vec<Value> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let connection = lapin::Connection::connect(url, Default::default()).await.expect("connection");
        let channel = connection.create_channel().await.expect("channel");
        let mut told = Vec::new();
        // What is not acknowledged goes back when the channel closes.
        while let Some(message) =
            channel.basic_get("hutch.results".into(), BasicGetOptions::default()).await.expect("get")
        {
            let result: Value = serde_json::from_slice(&message.data).expect("a result");
            told.extend((result["id"] == id).then_some(result));
        }
        told
    })
}

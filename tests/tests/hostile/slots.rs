//! What passes from a job to the next one in its slot, where a slot keeps its network namespace.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use hutch_sandbox::Defence;
use hutch_tests::house::{House, Served};
use hutch_tests::hutch::binary;
use serde_json::json;

use crate::attack::{Attack, Outcome, test_name};
use crate::site::{Site, hostile, hostile_outside, text};

const PATIENCE: Duration = Duration::from_secs(60);
const SETTING: &str = "HUTCH__WORKER__NETWORK_NAMESPACE";

/// One job holds a slot, and what another one leaves: the socket on which that listened, in the namespace of the slot
/// that it had. The next job there looks for it.
fn leave_a_listener(site: &Site, port: &str) -> Outcome {
    let place = site.allowed().join(format!("left-{port}"));
    fs::create_dir_all(&place).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o777)).unwrap();
    let volume = json!({"volumes": [{"host_path": place, "target": "/left", "read_only": false}]});
    let holds = site.served().post("/v1/jobs", &hostile(&["hold-descriptor", "/left/socket"], &volume));
    let begun = Instant::now();
    while !place.join("socket").exists() {
        assert!(begun.elapsed() < PATIENCE, "nobody waits for the socket: {holds}");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(site.hostile(&["leave-listener", "/left/socket", port], &volume), "LEFT\n");
    let said = site.hostile(&["connect", "127.0.0.1", port], &json!({}));
    fs::write(place.join("socket.done"), "").unwrap();
    let path = format!("/v1/jobs/{}", holds["id"].as_str().unwrap());
    while site.served().get_json(&path)["state"] != "finished" {
        assert!(begun.elapsed() < PATIENCE * 2, "the socket is held still");
        std::thread::sleep(Duration::from_millis(10));
    }
    let held = site.served().get_json(&path);
    assert_eq!(text(&held["result"]["stdout"]), "HELD\n", "{held}");
    Outcome::held_if(!said.contains(&format!("{port} OK")), said.trim())
}

#[test]
fn a70_a_listener_left_for_the_next_job_of_a_slot() {
    Attack::new(
        "70: a listening socket that another sandbox holds, left in the network namespace of its slot (`per-slot`)",
        "the namespace is proved untouched before each job, or made anew",
        |site| leave_a_listener(site, "4711"),
    )
    .with(SETTING, "per-slot")
    .control(|| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let said = hostile_outside(&["connect", "127.0.0.1", &port])?;
        if said.contains(&format!("{port} OK")) { Ok("it is reached".to_owned()) } else { Err(said) }
    })
    .bites_without(&[Defence::UntouchedNetwork])
    .run();
}

/// The kernel's numbers of the namespaces that jobs were in, one after another in one slot: two that did nothing, one
/// after another that used the network, and one more.
fn cookies(setting: &str) -> Vec<String> {
    let house = House::new();
    let mut command = house.command_of(binary(), &["up", "--slots", "1"]);
    command.env("HUTCH__WORKER__LAYER_DIRS", "/").env(SETTING, setting);
    let served = Served::start(command);
    let run = |words: &[&str]| {
        let result = served.post("/v1/jobs?wait_ms=60000", &hostile(words, &json!({})));
        assert_eq!(result["status"], "succeeded", "{result:#}");
        text(&result["stdout"]).trim().to_owned()
    };
    let mut cookies = vec![run(&["network-cookie"]), run(&["network-cookie"])];
    run(&["connect", "127.0.0.1", "4711"]);
    cookies.extend([run(&["network-cookie"]), run(&["network-cookie"])]);
    cookies
}

#[test]
fn a_slot_keeps_its_network_namespace_only_while_it_is_untouched() {
    if House::with_sandboxes().is_none() {
        return;
    }
    let seen = cookies("per-slot");
    if seen[0].parse::<u64>().is_err() {
        return hutch_tests::skip(&test_name(), &format!("no cookies of namespaces here: {}", seen[0]));
    }
    assert_eq!(seen[0], seen[1], "an untouched namespace is kept: {seen:?}");
    assert_ne!(seen[1], seen[2], "one in which packets were sent is not: {seen:?}");
    assert_eq!(seen[2], seen[3], "{seen:?}");
    let mut fresh = cookies("fresh");
    fresh.dedup();
    assert_eq!(fresh.len(), 4, "each job has one of its own: {fresh:?}");
}

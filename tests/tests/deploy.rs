//! What is in deploy/ holds: the units are right, a worker has enough with the capabilities that they and the compose file
//! leave it, and files that are mounted are there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hutch_tests::house::{House, Served};
use hutch_tests::skip;
use serde_json::json;

fn root(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(root(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// What a container has of Docker, unless it is dropped.
const DOCKERS: &[&str] = &[
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "mknod",
    "net_bind_service",
    "net_raw",
    "setfcap",
    "setgid",
    "setpcap",
    "setuid",
    "sys_chroot",
    "audit_write",
];

/// The capabilities of the unit, as setpriv(1) names them.
fn of_the_unit() -> BTreeSet<String> {
    read("deploy/systemd/hutch-worker.service")
        .lines()
        .filter_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .flat_map(str::split_whitespace)
        .map(|name| name.trim_start_matches("CAP_").to_lowercase())
        .collect()
}

/// The capabilities of the compose file's workers.
fn of_the_container() -> BTreeSet<String> {
    let compose = read("docker-compose.yml");
    let added = compose.lines().find_map(|line| line.trim().strip_prefix("cap_add: [")).expect("cap_add");
    let added = added.trim_end_matches(']').split(", ").map(str::to_lowercase);
    added.chain(DOCKERS.iter().map(|name| (*name).to_owned())).collect()
}

/// `hutch up` that can have these capabilities and no others, whoever it is.
fn with_capabilities(house: &House, all: &BTreeSet<String>) -> Served {
    let bounding: Vec<_> = all.iter().map(|name| format!(",+{name}")).collect();
    let hutch = house.command(&["up", "--slots", "1"]);
    let mut command = Command::new("setpriv");
    command.arg(format!("--bounding-set=-all{}", bounding.concat())).arg(hutch.get_program());
    command.args(hutch.get_args()).env_remove("HUTCH_URL").env("HUTCH__DATA_DIR", house.path("data"));
    Served::start(command)
}

/// Jobs that need most of what an engine does: mounts, devices, owners of files, limits, scratch space on disk, an end by force.
fn runs_jobs(served: &Served, who: &str) {
    let script = "id -u; echo x > f; ls /dev/null; test -d /proc/self; sleep 600 & exit 7";
    let job = json!({"layers": ["host"], "command": ["sh", "-c", script], "cwd": "/box",
        "volumes": [{"volume": "kept", "target": "/kept", "read_only": false}],
        "outputs": {"paths": ["/box/**"]}, "limits": {"wall_time_ms": 60_000}});
    let result = served.post("/v1/jobs?wait_ms=120000", &job);
    assert_eq!(
        (&result["exit_code"], &result["stdout"]["text"]),
        (&json!(7), &json!("1001\n/dev/null\n")),
        "{who}: {result}"
    );
    let eats = json!({"layers": ["host"], "command": ["sh", "-c", "head -c 200000000 /dev/zero > /tmp/f"],
        "limits": {"memory_bytes": 33_554_432, "wall_time_ms": 60_000}});
    let result = served.post("/v1/jobs?wait_ms=120000", &eats);
    assert_eq!(result["reason"], "memory", "{who}: {result}");
}

#[test]
fn a_worker_has_enough_with_the_capabilities_that_it_is_given() {
    for (who, capabilities) in [("systemd", of_the_unit()), ("container", of_the_container())] {
        assert!(
            capabilities.contains("sys_admin") && !capabilities.contains("sys_module"),
            "{capabilities:?}"
        );
        let Some(house) = House::with_sandboxes() else { return };
        runs_jobs(&with_capabilities(&house, &capabilities), who);
    }
}

#[test]
fn the_units_are_right() {
    if !Path::new("/usr/bin/systemd-analyze").exists() {
        return skip("the_units_are_right", "systemd-analyze is not installed");
    }
    let directory = tempfile::tempdir().expect("directory");
    for unit in ["hutch-worker.service", "hutch-gateway.service"] {
        // The binary is not where it will be.
        let text = read(&format!("deploy/systemd/{unit}")).replace("/usr/local/bin/hutch", "/usr/bin/true");
        let path = directory.path().join(unit);
        fs::write(&path, text).expect("write");
        let output =
            Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().expect("run");
        let said = String::from_utf8_lossy(&output.stderr);
        // It complains of this host's own units too.
        let ours: Vec<_> = said.lines().filter(|line| line.contains(unit)).collect();
        assert!(ours.is_empty(), "{ours:#?}");
    }
}

/// A unit with a wrong name in it is not right: the check can fail.
#[test]
fn a_wrong_unit_is_found() {
    if !Path::new("/usr/bin/systemd-analyze").exists() {
        return skip("a_wrong_unit_is_found", "systemd-analyze is not installed");
    }
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("wrong.service");
    fs::write(&path, "[Service]\nExecStart=/usr/bin/true\nProtectEverything=yes\n").expect("write");
    let output =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().expect("run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ProtectEverything"), "{said}");
}

#[test]
fn what_the_compose_file_mounts_is_there() {
    let compose = read("docker-compose.yml");
    let mounted: Vec<_> =
        compose.split(['"', ' ', '\n']).filter(|word| word.starts_with("./deploy/")).collect();
    assert!(mounted.len() >= 3, "{mounted:?}");
    for mount in mounted {
        let source = mount.split(':').next().unwrap_or_default();
        assert!(root(source).exists(), "docker-compose.yml: {source} is not there");
    }
}

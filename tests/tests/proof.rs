//! The doctor's attacks, and the worker that takes no jobs while one gets through.
//!
//! Each trial is shown to bite: with its defence taken away, which the tests' own binary can do, it fails, and no worker
//! would take a job.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hutch_sandbox::Defence;
use hutch_tests::house::{Done, House, Served};
use serde_json::{Value, json};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

const TRIALS: [&str; 16] = [
    "sandbox",
    "namespaces",
    "processes",
    "descriptors",
    "environment",
    "capabilities",
    "no_new_privileges",
    "system_calls",
    "devices",
    "proc",
    "host_files",
    "network",
    "process_limit",
    "disk_limit",
    "memory_limit",
    "store",
];

/// Which trial fails without a defence. Where the sandbox itself cannot be made without it, that is what fails.
const BITES: &[(Defence, &str)] = &[
    (Defence::UserNamespace, "sandbox"),
    (Defence::NetworkNamespace, "network"),
    (Defence::PidNamespace, "processes"),
    (Defence::IpcNamespace, "namespaces"),
    (Defence::CgroupNamespace, "namespaces"),
    (Defence::CloseDescriptors, "descriptors"),
    (Defence::DeviceTree, "sandbox"),
    (Defence::OwnProc, "proc"),
    (Defence::ProcMasks, "proc"),
    (Defence::Seccomp, "system_calls"),
    (Defence::Capabilities, "capabilities"),
    (Defence::NoSuid, "host_files"),
    (Defence::NoDev, "host_files"),
    (Defence::CleanEnvironment, "environment"),
    (Defence::PrivateStore, "store"),
    (Defence::NeverPidOne, "processes"),
    (Defence::MemoryLimit, "memory_limit"),
    (Defence::ProcessLimit, "process_limit"),
    (Defence::SizedScratch, "disk_limit"),
];

fn weak(test: &str) -> Option<PathBuf> {
    hutch_tests::hutch::weak_binary().map_err(|why| hutch_tests::skip(test, &why)).ok()
}

/// The names of the findings that fail.
fn failures(report: &Value) -> Vec<String> {
    let findings = report["findings"].as_array().expect("findings");
    let failed = findings.iter().filter(|finding| finding["grade"] == "failure");
    failed.map(|finding| finding["name"].as_str().expect("name").to_owned()).collect()
}

#[test]
fn every_attack_of_the_doctor_is_held() {
    let Some(house) = House::with_sandboxes() else { return };
    let done = house.hutch(&["doctor", "--json"]);
    let report = done.json();
    assert_eq!((done.code, &report["ok"]), (0, &json!(true)), "{report:#}");
    let findings = report["findings"].as_array().expect("findings");
    for trial in TRIALS {
        let finding = findings.iter().find(|finding| finding["name"] == trial);
        let finding = finding.unwrap_or_else(|| panic!("{trial} is missing: {report:#}"));
        assert_eq!((&finding["grade"], &finding["remedy"]), (&json!("ok"), &json!("")), "{finding}");
    }
    let text = house.hutch(&["doctor"]);
    assert!(text.stdout.contains("ok    system_calls") && !text.stdout.contains("FAIL"), "{text:?}");
}

#[test]
fn each_attack_gets_through_without_its_defence() {
    let Some(_) = House::with_sandboxes() else { return };
    let Some(binary) = weak("the doctor without defences") else { return };
    for (defence, trial) in BITES {
        let house = House::new();
        let mut command = house.command_of(&binary, &["doctor", "--json"]);
        let done: Done = command.env("HUTCH_WITHOUT", defence.name()).output().expect("run").into();
        let report = done.json();
        let failed = failures(&report);
        assert!(failed.iter().any(|name| name == trial), "without {}: {report:#}", defence.name());
        assert_eq!((done.code, &report["ok"]), (1, &json!(false)), "without {}", defence.name());
        for finding in report["findings"].as_array().expect("findings") {
            assert_eq!(finding["remedy"] == "", finding["grade"] == "ok", "{finding}");
        }
    }
}

/// Waits for what /readyz says to be so.
fn wait_for(served: &Served, what: impl Fn(&str) -> bool) -> String {
    let begun = Instant::now();
    loop {
        let said = served.get("/readyz");
        if what(&said) {
            return said;
        }
        assert!(begun.elapsed() < PATIENCE, "/readyz still says {said}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_worker_takes_no_job_while_an_attack_gets_through() {
    let Some(_) = House::with_sandboxes() else { return };
    let Some(binary) = weak("the worker without a defence") else { return };
    let serve = |house: &House, prove: &str| {
        let mut command = house.command_of(&binary, &["up", "--slots", "1"]);
        command.env("HUTCH_WITHOUT", Defence::Seccomp.name()).env("HUTCH__WORKER__PROVE", prove);
        Served::start(command)
    };
    let job = json!({"layers": ["host"], "command": ["true"]});

    let house = House::new();
    let served = serve(&house, "true");
    let ready = &served.ready;
    assert!(ready.contains("no job is taken") && ready.contains("system_calls"), "{ready}");
    let said = wait_for(&served, |said| said.contains("system_calls"));
    assert!(said.contains("would not be isolated") && said.contains("CONFIG_SECCOMP_FILTER"), "{said}");
    let id = served.post("/v1/jobs", &job)["id"].as_str().expect("id").to_owned();
    // Long enough for a job to be taken, and it does no harm if the machine is too busy for that: then it holds anyway.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(served.get_json(&format!("/v1/jobs/{id}"))["state"], "queued");
    assert!(served.get("/readyz").contains("system_calls"), "it does not become ready");
    served.signal(nix::sys::signal::Signal::SIGTERM);
    let (code, said) = served.end();
    assert_eq!(code, 0, "it ends when it is told to: {said}");

    // The control: told not to look, the same binary takes the same job.
    let house = House::new();
    let served = serve(&house, "false");
    let result = served.post("/v1/jobs?wait_ms=60000", &job);
    assert_eq!(result["status"], "succeeded", "{result:#}");
}

#[test]
fn a_worker_that_is_proven_is_ready_and_takes_jobs() {
    let Some(house) = House::with_sandboxes() else { return };
    // Without the host layer and with a policy that kills: what jobs may do here is not what the attacks need.
    let served = house.serve_with(
        &["up", "--slots", "1"],
        &[
            ("HUTCH__WORKER__ALLOW_HOST_LAYER", "false"),
            ("HUTCH__WORKER__SECCOMP__REFUSED", "kill"),
            ("HUTCH__WORKER__SECCOMP__PROFILE", "strict"),
            ("HUTCH__WORKER__MAX_LIMITS__MEMORY_BYTES", "16MiB"),
        ],
    );
    wait_for(&served, |said| !said.contains("isolated") && !said.contains("not"));
    let job = json!({"layers": ["host"], "command": ["true"]});
    let result = served.post("/v1/jobs?wait_ms=60000", &job);
    assert_eq!(result["status"], "rejected", "the host layer stays off for jobs: {result:#}");
}

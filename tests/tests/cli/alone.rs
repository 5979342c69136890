//! Commands that need neither a sandbox nor a gateway.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;

use hutch_tests::house::{Done, House};

use crate::first_line;

#[test]
fn help_has_examples_and_wrong_usage_ends_with_2() {
    let house = House::new();
    for command in ["", "run", "up", "worker", "gateway", "submit", "outputs", "completion"] {
        let arguments: Vec<&str> = [command, "--help"].into_iter().filter(|word| !word.is_empty()).collect();
        let help = house.hutch(&arguments);
        assert_eq!(help.code, 0, "{help:?}");
        assert!(help.stdout.contains("Example"), "{command}: {}", help.stdout);
    }
    for wrong in [&[][..], &["dance"], &["run"], &["run", "--memory", "much", "--", "true"], &["status", "x"]]
    {
        assert_eq!(house.hutch(wrong).code, 2, "{wrong:?}");
    }
    assert!(house.hutch(&["--version"]).stdout.starts_with("hutch "));
}

#[test]
fn a_spec_is_checked_and_every_problem_named() {
    let house = House::new();
    let good = house.file("good.json", r#"{"layers": ["host"], "command": ["true"]}"#);
    let done = house.hutch(&["spec", "check", &good]);
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:?}");
    let done = house.hutch_with_stdin(&["spec", "check", "-"], br#"{"layers": [], "priority": 99}"#);
    assert_eq!(done.code, 1);
    for word in ["stdin is not a job", "layers: at least one", "priority: 0..=31"] {
        assert!(done.stderr.contains(word), "{word}: {}", done.stderr);
    }
    let done = house.hutch_with_stdin(&["spec", "check", "-"], b"{\"layers\": [\"\x1b[31m\"]}");
    assert!(!done.stderr.contains('\x1b'), "{:?}", done.stderr);
    assert_eq!(house.hutch(&["spec", "schema"]).json()["title"], "JobSpec");
}

#[test]
fn config_shows_what_is_in_force_and_from_where() {
    let house = House::new();
    house.file("hutch.toml", "[worker]\nslots = 3\n");
    let done = house.hutch(&["config", "show"]);
    for (key, from) in [("worker.slots = 3 ", "file hutch.toml"), ("data_dir", "env HUTCH__DATA_DIR")] {
        let line =
            done.stdout.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{done:?}"));
        assert!(line.contains(from), "{line}");
    }
    house.file("hutch.toml", "[worker]\nslotz = 3\n");
    let done = house.hutch(&["config", "show"]);
    assert_eq!(done.code, 1);
    assert!(done.stderr.contains("worker.slotz") && done.stderr.contains("worker.slots"), "{done:?}");
    let done = house.hutch(&["--config", "nowhere.toml", "config", "show"]);
    assert!(done.code == 1 && done.stderr.contains("nowhere.toml"), "{done:?}");
}

#[test]
fn every_shell_gets_its_completions() {
    let house = House::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(house.hutch(&["completion", shell]).stdout.contains("hutch"), "{shell}");
    }
}

#[test]
fn a_gateway_that_is_not_there_is_said_so() {
    let house = House::new();
    let spec = house.file("job.json", r#"{"layers": ["host"], "command": ["true"]}"#);
    let done = house.hutch(&["submit", &spec, "--url", "http://127.0.0.1:1"]);
    assert_eq!(done.code, 1);
    assert!(done.stderr.contains("127.0.0.1:1") && done.stderr.contains("hutch up"), "{done:?}");
    let done = house.hutch(&["submit", &spec, "--url", "example.org"]);
    assert!(done.code == 1 && done.stderr.contains("http://127.0.0.1:7070"), "{done:?}");
}

#[test]
fn nobody_listens_to_the_world_without_tokens() {
    let house = House::new();
    let done = house.hutch(&["gateway", "--listen", "0.0.0.0:0"]);
    assert_eq!(done.code, 1);
    assert!(done.stderr.contains("tokens_file"), "{done:?}");
    let done = house.hutch(&["gateway", "--listen", "somewhere"]);
    assert!(done.code == 1 && done.stderr.contains("somewhere"), "{done:?}");
}

#[test]
fn a_gateway_that_no_worker_can_reach_says_so() {
    let house = House::new();
    let said = first_line(house.command(&["gateway", "--listen", "127.0.0.1:0"]));
    assert!(said.contains("hutch up") && said.contains("--broker"), "{said}");
}

#[test]
fn the_doctor_lists_all_findings_also_to_a_user_who_may_do_nothing() {
    let house = House::new();
    // The house and the binary are root's alone.
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(house.path("."), open).expect("open");
    let binary = house.path("hutch");
    // By a process of its own: one that another test forks meanwhile would hold a copy of ours open for writing.
    let copied = std::process::Command::new("cp").arg(hutch_tests::hutch::binary()).arg(&binary).status();
    assert!(copied.expect("run cp").success());
    let doctor = |arguments: &[&str]| -> Done {
        let mut command = std::process::Command::new(&binary);
        command.args(arguments).current_dir(house.path(".")).env("HUTCH__DATA_DIR", house.path("data"));
        if nix::unistd::geteuid().is_root() {
            command.uid(65_534).gid(65_534);
        }
        command.output().expect("run").into()
    };
    let json = doctor(&["doctor", "--json"]);
    let findings = json.json()["findings"].as_array().expect("findings").clone();
    let names: Vec<_> = findings.iter().filter_map(|finding| finding["name"].as_str()).collect();
    assert_eq!(names, ["kernel", "user", "core_pattern", "data", "sandbox"]);
    for finding in &findings {
        assert_eq!(finding["remedy"] == "", finding["grade"] == "ok", "{finding}");
    }
    let text = doctor(&["doctor"]);
    assert_eq!((json.code, text.code), (1, 1), "{text:?}");
    assert_eq!(json.json()["ok"], false);
    assert!(text.stdout.contains("FAIL  sandbox") && text.stdout.contains("CAP_SYS_ADMIN"), "{text:?}");
}

#[test]
fn volumes_are_listed_and_removed() {
    let house = House::new();
    assert_eq!(house.hutch(&["volume", "list"]).stdout, "");
    let volume = house.path("data/volumes/cache");
    std::fs::create_dir_all(&volume).expect("make");
    std::fs::write(volume.join("f"), "12345").expect("write");
    assert_eq!(house.hutch(&["volume", "list"]).stdout.trim(), "5B  cache");
    let json = house.hutch(&["volume", "list", "--json"]).json();
    assert_eq!(json, serde_json::json!([{"volume": "cache", "bytes": 5}]));
    assert_eq!(house.hutch(&["volume", "remove", "cache"]).code, 0);
    assert!(volume.symlink_metadata().is_err());
    let done = house.hutch(&["volume", "remove", "cache"]);
    assert!(done.code == 1 && done.stderr.contains("no volume `cache`"), "{done:?}");
    assert_eq!(house.hutch(&["volume", "remove", "../data"]).code, 1);
}

#[test]
fn exec_says_where_it_looked_for_a_gateway() {
    let house = House::new();
    let id = "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34";
    let done = house.hutch(&["exec", "--url", "http://127.0.0.1:1", id, "--", "ls"]);
    assert!(done.code == 125 && done.stderr.contains("http://127.0.0.1:1"), "{done:?}");
}

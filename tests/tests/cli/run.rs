//! `hutch run`: one job, here.

use hutch_tests::house::House;

#[test]
fn it_exits_as_its_program_did() {
    let Some(house) = House::with_sandboxes() else { return };
    let file = house.file("plain", "no program\n");
    let file = format!("{file}:/box/plain");
    for (arguments, code, word) in [
        (&["--", "true"][..], 0, ""),
        (&["--", "sh", "-c", "exit 3"], 3, "failed"),
        (&["--", "sh", "-c", "kill -SEGV $$"], 139, "SIGSEGV"),
        (&["--time", "300ms", "--", "sleep", "60"], 124, "wall_time"),
        (&["--cpu-time", "200ms", "--", "sh", "-c", "while :; do :; done"], 124, "cpu_time"),
        (&["--memory", "32MiB", "--", "tail", "/dev/zero"], 137, "memory"),
        (&["--refused", "kill", "--", "unshare", "--user", "true"], 159, "syscall"),
        (&["--", "no-such-program"], 127, "not found"),
        (&["--file", &file, "--", "/box/plain"], 126, "cannot be run"),
        (&["--layer", "dir:/no/such/dir", "--", "true"], 125, "/no/such/dir"),
        (&["--user", "nobody-here", "--", "true"], 125, "nobody-here"),
        (&["no-such-spec.json"], 125, "no-such-spec.json"),
    ] {
        let done = house.hutch(&[&["run"], arguments].concat());
        assert_eq!(done.code, code, "{arguments:?}: {done:?}");
        assert!(done.stderr.contains(word), "{arguments:?}: {done:?}");
        assert_eq!(done.stderr.is_empty(), code == 0, "{arguments:?}: {done:?}");
    }
    let quiet = house.hutch(&["run", "-q", "--", "sh", "-c", "exit 3"]);
    assert_eq!((quiet.code, quiet.stderr.as_str()), (3, ""));
}

#[test]
fn what_the_program_writes_goes_straight_through() {
    let Some(house) = House::with_sandboxes() else { return };
    let done = house.hutch(&["run", "--", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
    let done = house.hutch_with_stdin(&["run", "--stdin", "-", "--", "cat"], b"from afar");
    assert_eq!(done.stdout, "from afar");
    let done = house.hutch(&["run", "--", "cat"]);
    assert_eq!((done.code, done.stdout.as_str()), (0, ""), "nothing is read unless it is asked for");
}

#[test]
fn output_that_is_cut_is_said_so() {
    let Some(house) = House::with_sandboxes() else { return };
    let write = ["--", "head", "-c", "1500000", "/dev/zero"];
    let done = house.hutch(&[&["run", "-q"], &write[..]].concat());
    assert_eq!((done.code, done.stdout.len()), (0, 1 << 20));
    for word in ["stdout is cut: 1048576 of 1500000 bytes were kept", "--max-output"] {
        assert!(done.stderr.contains(word), "{}", done.stderr);
    }
    let done = house.hutch(&[&["run", "--max-output", "2MiB"], &write[..]].concat());
    assert_eq!((done.stdout.len(), done.stderr.as_str()), (1_500_000, ""));
}

#[test]
fn flags_reach_the_sandbox() {
    let Some(house) = House::with_sandboxes() else { return };
    let script = house.file("main.sh", "echo \"$GREETING from $(pwd) as $(id -u)\"\n");
    let done = house.hutch(&[
        "run",
        "--file",
        &format!("{script}:/box/main.sh"),
        "-e",
        "GREETING=hello",
        "-w",
        "/box",
        "-u",
        "1234",
        "--",
        "sh",
        "main.sh",
    ]);
    assert_eq!(done.stdout, "hello from /box as 1234\n", "{done:?}");
    let secret = house.command(&["run", "--", "env"]).env("SECRET", "x").output().expect("run");
    assert!(!String::from_utf8_lossy(&secret.stdout).contains("SECRET"));
}

#[test]
fn outputs_are_unpacked_where_they_are_wanted() {
    let Some(house) = House::with_sandboxes() else { return };
    let script = "mkdir out; echo kept > out/a; echo gone > b; ln -s /etc/passwd out/link";
    let done = house.hutch(&[
        "run",
        "-w",
        "/box",
        "-o",
        "/box/out/**",
        "--output-dir",
        "here",
        "--",
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(std::fs::read_to_string(house.path("here/box/out/a")).expect("kept"), "kept\n");
    assert!(
        house.path("here/box/b").symlink_metadata().is_err()
            && house.path("here/box/out/link").symlink_metadata().is_err()
    );
    assert!(done.stderr.contains("leads outside"), "{done:?}");
}

#[test]
fn volumes_outlive_the_job_and_host_paths_are_read_only() {
    let Some(house) = House::with_sandboxes() else { return };
    let write = house.hutch(&["run", "-v", "cache:/cache", "--", "sh", "-c", "echo kept > /cache/f"]);
    assert_eq!(write.code, 0, "{write:?}");
    let read = house.hutch(&["run", "-v", "cache:/cache:ro", "--", "cat", "/cache/f"]);
    assert_eq!(read.stdout, "kept\n", "{read:?}");
    std::fs::create_dir(house.path("shared")).expect("make");
    house.file("shared/f", "shared\n");
    let shared = format!("{}:/shared", house.path("shared").display());
    let read = house.hutch(&["run", "-v", &shared, "--", "sh", "-c", "cat /shared/f; echo x > /shared/g"]);
    assert_eq!(read.stdout, "shared\n", "{read:?}");
    assert!(read.code != 0 && house.path("shared/g").symlink_metadata().is_err());
}

#[test]
fn the_result_can_be_had_as_json() {
    let Some(house) = House::with_sandboxes() else { return };
    let done = house.hutch(&["run", "--json", "--", "sh", "-c", "echo hi; exit 3"]);
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "there is a result");
    let result = done.json();
    assert_eq!((&result["status"], &result["exit_code"]), (&"failed".into(), &3.into()));
    assert_eq!(result["stdout"]["text"], "hi\n");
    assert!(result["usage"]["memory_peak_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
}

#[test]
fn a_job_that_names_what_is_not_there_has_a_result_too() {
    let Some(house) = House::with_sandboxes() else { return };
    let nothing = format!("sha256:{}", "0".repeat(64));
    for (field, reason, words) in [
        (
            format!(r#""layers": ["host"], "stdin": {{"blob": "{nothing}"}}"#),
            "spec_invalid",
            "stdin: blob sha256:00",
        ),
        (format!(r#""layers": ["{nothing}"]"#), "image_error", "layers[0]: "),
    ] {
        let spec = house.file("job.json", &format!(r#"{{{field}, "command": ["true"]}}"#));
        let done = house.hutch(&["run", "--json", &spec]);
        assert_eq!(done.code, 0, "{done:?}");
        let result = done.json();
        assert_eq!((&result["status"], &result["reason"]), (&"rejected".into(), &reason.into()));
        assert!(result["message"].as_str().is_some_and(|message| message.starts_with(words)), "{result}");
        assert_eq!(house.hutch(&["run", &spec]).code, 125);
    }
}

#[test]
fn data_may_be_kept_at_a_relative_path() {
    let Some(house) = House::with_sandboxes() else { return };
    let spec = house.file(
        "job.json",
        r#"{"layers": ["host"], "cwd": "/box", "command": ["touch", "a"], "outputs": {"paths": ["/box/**"]}}"#,
    );
    let done = house.hutch(&["run", "--json", "--data", "d", &spec]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(done.json()["outputs"]["archive"]["blob"].is_string(), "{done:?}");
}

#[test]
fn a_spec_is_run_with_its_steps() {
    let Some(house) = House::with_sandboxes() else { return };
    let spec = house.file(
        "job.json",
        r#"{"layers": ["host"], "cwd": "/box", "steps": [
            {"name": "write", "command": ["sh", "-c", "echo from step one > f"]},
            {"name": "read", "command": ["cat", "f"]}]}"#,
    );
    assert_eq!(house.hutch(&["run", &spec]).stdout, "from step one\n");
}

#[test]
fn a_reader_that_goes_away_ends_the_job() {
    let Some(house) = House::with_sandboxes() else { return };
    let mut child = house
        .command(&["run", "-q", "--time", "30s", "--", "yes"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("spawn");
    drop(child.stdout.take());
    let begun = std::time::Instant::now();
    child.wait().expect("ended");
    assert!(begun.elapsed() < std::time::Duration::from_secs(15), "{:?}", begun.elapsed());
}

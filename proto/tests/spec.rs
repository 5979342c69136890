//! What is read, what is refused, and what is said of it.

use hutch_proto::{JobSpec, LimitPolicy, LimitsSpec, SpecError};
use proptest::prelude::*;

fn parse(json: &str) -> Result<JobSpec, SpecError> {
    JobSpec::parse(json.as_bytes())
}

fn error_of(json: &str) -> String {
    parse(json).expect_err(json).to_string()
}

const FULL: &str = r#"{
  "id": "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34",
  "layers": ["image:docker.io/library/python:3.12", "sha256:9f00000000000000000000000000000000000000000000000000000000000000", "job:0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34"],
  "command": ["python3", "main.py"],
  "env": {"LANG": "C.UTF-8"},
  "cwd": "/box",
  "user": "1001:1001",
  "stdin": {"text": "1 2\n"},
  "files": [{"path": "/box/main.py", "text": "print(sum(map(int, input().split())))", "mode": "0644"}],
  "limits": {"wall_time_ms": 10000, "cpu_time_ms": 5000, "memory_bytes": 268435456},
  "volumes": [{"volume": "pip-cache", "target": "/cache", "read_only": false}],
  "network": "none",
  "outputs": {"paths": ["/box/out/**"], "layer": false},
  "steps": [],
  "queue": "default", "priority": 4, "max_attempts": 3, "expires_in_ms": 3600000,
  "labels": {"tenant": "acme"}
}"#;

#[test]
fn the_contract_s_example_is_read() {
    let spec = parse(FULL).expect("valid");
    assert_eq!(spec.layers.len(), 3);
    assert_eq!(spec.limits.wall_time_ms, Some(10_000));
    assert!(!spec.volumes[0].read_only);
    let again = parse(&serde_json::to_string(&spec).expect("json")).expect("valid");
    assert_eq!(spec, again);
}

#[test]
fn what_is_left_out_has_the_contract_s_default() {
    let spec = parse(r#"{"layers": ["host"], "command": ["true"]}"#).expect("valid");
    assert_eq!(spec.user.to_string(), "1001:1001");
    assert_eq!((spec.queue.as_str(), spec.priority, spec.max_attempts), ("default", 4, 3));
    let limits = LimitPolicy::default().resolve(&spec.limits, "limits").expect("limits");
    assert_eq!((limits.wall_time_ms, limits.memory_bytes, limits.pids), (60_000, 512 << 20, 128));
    assert_eq!((limits.cpu_time_ms, limits.core_bytes), (None, 0));
}

#[test]
fn a_worker_s_maximum_is_named() {
    let policy = LimitPolicy {
        maximums: LimitsSpec { memory_bytes: Some(1 << 30), cpu_time_ms: Some(9), ..LimitsSpec::default() },
        ..LimitPolicy::default()
    };
    let asked = LimitsSpec { memory_bytes: Some(2 << 30), ..LimitsSpec::default() };
    let problems = policy.resolve(&asked, "limits").expect_err("too much");
    assert_eq!(
        problems[0].to_string(),
        "limits.memory_bytes: 2147483648 is above this worker's maximum of 1073741824"
    );
    let none = policy.resolve(&LimitsSpec::default(), "limits").expect("limits");
    assert_eq!(none.cpu_time_ms, Some(9), "unlimited becomes the maximum");
}

/// Each bad spec and what its error must say: the path, and what would be right.
const BAD: &[(&str, &[&str])] = &[
    ("", &["not JSON"]),
    ("{", &["not JSON"]),
    ("nonsense", &["not JSON"]),
    (r#"{"layers": ["host"]} x"#, &["not JSON"]),
    ("[]", &["an object is expected, not an array"]),
    ("null", &["an object is expected, not null"]),
    (r#"["0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34", ["host"], ["true"]]"#, &["an object is expected"]),
    (r#"{"layers": ["host"], "limits": [5000]}"#, &["limits: an object is expected, not an array"]),
    (
        r#"{"layers": ["host"], "command": ["a"], "limits": {"io_write_bytes_per_s": 1000}}"#,
        &["limits.io_write_bytes_per_s: 65536..="],
    ),
    (r#"{"layers": ["host"], "limits": null}"#, &["limits: an object is expected, not null"]),
    (r#"{"layers": ["host"], "stdin": ["hello"]}"#, &["stdin: an object is expected"]),
    (r#"{"layers": ["host"], "files": [["/a", "x"]]}"#, &["files[0]: an object is expected"]),
    (r#"{"layers": ["host"], "volumes": [["v", null, "/a"]]}"#, &["volumes[0]: an object is expected"]),
    (r#"{"layers": ["host"], "outputs": [["/a"]]}"#, &["outputs: an object is expected"]),
    (r#"{"layers": ["host"], "steps": [["x", ["b"]]]}"#, &["steps[0]: an object is expected"]),
    (r#"{"layers": ["host"], "steps": {"name": "x"}}"#, &["steps: an array of objects is expected"]),
    (
        r#"{"layers": ["host"], "steps": [{"name": "x", "command": ["b"], "stdin": ["x"]}]}"#,
        &["steps[0].stdin: an object is expected"],
    ),
    (
        r#"{"layers": ["host"], "steps": [{"name": "x", "command": ["b"], "limits": [1]}]}"#,
        &["steps[0].limits: an object is expected"],
    ),
    (r#"{"layers": ["host"], "env": [["A", "1"]]}"#, &["env: an object is expected"]),
    (r#"{"layers": ["host"], "env": {"A": "1", "A": "2"}}"#, &["env: `A` is given twice"]),
    (r#"{"layers": ["host"], "env": {"A": "1", "\u0041": "2"}}"#, &["env: `A` is given twice"]),
    (r#"{"layers": ["host"], "labels": {"a": "1", "a": "1"}}"#, &["labels: `a` is given twice"]),
    (
        r#"{"layers": ["host"], "steps": [{"name": "x", "command": ["b"], "env": {"A": "", "A": ""}}]}"#,
        &["steps[0].env: `A` is given twice"],
    ),
    (r#"{"layers": ["host"], "tty": 1}"#, &["tty: true or false is expected, not `1`"]),
    (r#"{"layers": ["host"], "network": 5}"#, &["network: a string is expected"]),
    (r#"{"layers": ["host"], "queue": {}}"#, &["queue: a string is expected, not an object"]),
    ("{}", &["layers"]),
    (r#"{"layers": []}"#, &["layers", "at least one"]),
    (r#"{"layers": ["host"], "comand": ["true"]}"#, &["comand", "expected one of", "command"]),
    (r#"{"layers": ["host"], "limits": {"memory": 1}}"#, &["limits", "memory", "memory_bytes"]),
    (
        r#"{"layers": ["host"], "limits": {"memory_bytes": "1G"}}"#,
        &["limits.memory_bytes: a whole number from 0 on is expected"],
    ),
    (
        r#"{"layers": ["host"], "limits": {"memory_bytes": -1}}"#,
        &["limits.memory_bytes: a whole number from 0 on is expected"],
    ),
    (
        r#"{"layers": ["host"], "limits": {"memory_bytes": 1.5}}"#,
        &["limits.memory_bytes: a whole number from 0 on is expected"],
    ),
    (r#"{"layers": ["host"], "limits": {"memory_bytes": 1}}"#, &["limits.memory_bytes", "1048576.."]),
    (r#"{"layers": ["host"], "limits": {"wall_time_ms": 0}}"#, &["limits.wall_time_ms", "1.."]),
    (r#"{"layers": ["host"], "limits": {"cpuset": "1-0"}}"#, &["limits.cpuset", "0-1"]),
    (
        r#"{"layers": ["host"], "limits": {"output_overflow": "drop"}}"#,
        &["limits.output_overflow", "truncate"],
    ),
    (r#"{"layers": ["python"]}"#, &["layers[0]", "image:<reference>"]),
    (r#"{"layers": ["dir:relative"]}"#, &["layers[0]", "absolute"]),
    (r#"{"layers": ["dir:/a/../b"]}"#, &["layers[0]", ".."]),
    (r#"{"layers": ["sha256:12"]}"#, &["layers[0]", "64"]),
    (r#"{"layers": ["job:1"]}"#, &["layers[0]", "UUID"]),
    (r#"{"layers": ["image:"]}"#, &["layers[0]", "reference"]),
    (r#"{"layers": ["dir:/a", "host"]}"#, &["layers[1]", "bottom"]),
    (r#"{"id": "../../etc", "layers": ["host"]}"#, &["id", "UUID"]),
    (r#"{"id": "{0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34}", "layers": ["host"]}"#, &["id", "UUID"]),
    (r#"{"layers": ["host"], "command": []}"#, &["command", "program"]),
    (r#"{"layers": ["host"], "command": [""]}"#, &["command[0]", "empty"]),
    (r#"{"layers": ["host"], "command": "ls -l"}"#, &["command: an array is expected, not \"ls -l\""]),
    (r#"{"layers": ["host"], "command": ["a\u0000b"]}"#, &["command[0]", "NUL"]),
    (r#"{"layers": ["host"], "env": {"A=B": "c"}}"#, &["env", "A=B"]),
    (r#"{"layers": ["host"], "env": {"A": "\u0000"}}"#, &["env.A", "NUL"]),
    (r#"{"layers": ["host"], "cwd": "box"}"#, &["cwd", "absolute"]),
    (r#"{"layers": ["host"], "cwd": "/a/../.."}"#, &["cwd", ".."]),
    (r#"{"layers": ["host"], "user": ""}"#, &["user", "empty"]),
    (r#"{"layers": ["host"], "user": "70000"}"#, &["user", "65534"]),
    (r#"{"layers": ["host"], "user": "a b"}"#, &["user", "letters"]),
    (r#"{"layers": ["host"], "stdin": {}}"#, &["stdin", "one of `text`, `base64`, `blob`"]),
    (r#"{"layers": ["host"], "stdin": {"text": "", "base64": ""}}"#, &["stdin", "only one"]),
    (r#"{"layers": ["host"], "stdin": {"base64": "!"}}"#, &["stdin", "base64"]),
    (r#"{"layers": ["host"], "stdin": "hello"}"#, &["stdin"]),
    (r#"{"layers": ["host"], "files": [{"path": "/a", "text": "", "mode": "rw"}]}"#, &["files[0]", "octal"]),
    (
        r#"{"layers": ["host"], "files": [{"path": "/a", "text": "", "mode": "4755"}]}"#,
        &["files[0].mode", "permission"],
    ),
    (r#"{"layers": ["host"], "files": [{"path": "/a", "text": "", "owner": 1}]}"#, &["files[0]", "owner"]),
    (
        r#"{"layers": ["host"], "files": [{"path": "/proc/self/mem", "text": ""}]}"#,
        &["files[0].path", "/proc"],
    ),
    (r#"{"layers": ["host"], "files": [{"path": "/", "text": ""}]}"#, &["files[0].path", "below"]),
    (
        r#"{"layers": ["host"], "files": [{"path": "/a", "text": ""}, {"path": "//a", "text": ""}]}"#,
        &["files[1].path", "already"],
    ),
    (
        r#"{"layers": ["host"], "volumes": [{"target": "/a"}]}"#,
        &["volumes[0]", "one of `volume`, `host_path`"],
    ),
    (
        r#"{"layers": ["host"], "volumes": [{"volume": "../x", "target": "/a"}]}"#,
        &["volumes[0].volume", "letters"],
    ),
    (
        r#"{"layers": ["host"], "volumes": [{"host_path": "/a/../b", "target": "/a"}]}"#,
        &["volumes[0].host_path", ".."],
    ),
    (
        r#"{"layers": ["host"], "volumes": [{"volume": "x", "target": "/dev/shm"}]}"#,
        &["volumes[0].target", "/dev"],
    ),
    (r#"{"layers": ["host"], "network": "host"}"#, &["network", "none", "egress"]),
    (r#"{"layers": ["host"], "outputs": {"paths": ["out/*"]}}"#, &["outputs.paths[0]", "absolute"]),
    (
        r#"{"layers": ["host"], "outputs": {"paths": ["/a", "/["]}}"#,
        &["outputs.paths[1]", "not a glob", "']'"],
    ),
    (r#"{"layers": ["host"], "outputs": {"paths": ["/{a"]}}"#, &["outputs.paths[0]", "not a glob"]),
    (
        r#"{"layers": ["host"], "command": ["a"], "steps": [{"name": "x", "command": ["b"]}]}"#,
        &["steps", "not both"],
    ),
    (
        r#"{"layers": ["host"], "steps": [{"name": "x", "command": ["b"]}, {"name": "x", "command": ["b"]}]}"#,
        &["steps[1].name", "already"],
    ),
    (r#"{"layers": ["host"], "steps": [{"name": "", "command": ["b"]}]}"#, &["steps[0].name", "1 to 63"]),
    (r#"{"layers": ["host"], "steps": [{"name": "x"}]}"#, &["steps[0]", "command"]),
    (
        r#"{"layers": ["host"], "steps": [{"name": "x", "command": ["a"], "limits": {"pids": 0}}]}"#,
        &["steps[0].limits.pids", "1.."],
    ),
    (r#"{"layers": ["host"], "queue": "a/b"}"#, &["queue", "letters"]),
    (r#"{"layers": ["host"], "priority": 32}"#, &["priority", "0..=31"]),
    (r#"{"layers": ["host"], "priority": 300}"#, &["priority: a whole number from 0 to 31 is expected"]),
    (
        r#"{"layers": ["host"], "max_attempts": -1}"#,
        &["max_attempts: a whole number from 1 to 100 is expected"],
    ),
    (r#"{"layers": ["host"], "max_attempts": 0}"#, &["max_attempts", "1..=100"]),
    (r#"{"layers": ["host"], "labels": {"a b": "c"}}"#, &["labels", "a b"]),
    (r#"{"layers": ["host"], "labels": {"a": "\u001b[31m"}}"#, &["labels.a", "control"]),
    (r#"{"layers": ["host"], "layers": ["host"]}"#, &["duplicate field", "layers"]),
];

#[test]
fn every_bad_spec_is_told_where_and_what_would_be_right() {
    for (json, words) in BAD {
        let message = error_of(json);
        for word in *words {
            assert!(message.contains(word), "{json}\n  says: {message}\n  lacks: {word}");
        }
    }
}

#[test]
fn bombs_are_refused_before_they_are_unpacked() {
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(parse(&nested).is_err());
    let big = format!(r#"{{"layers": ["host"], "stdin": {{"text": "{}"}}}}"#, "x".repeat(9 << 20));
    assert!(error_of(&big).contains("blobs"));
    let env: Vec<String> = (0..100_000).map(|n| format!("\"v{n}\": \"\"")).collect();
    assert!(
        error_of(&format!(r#"{{"layers": ["host"], "env": {{{}}}}}"#, env.join(",")))
            .contains("at most 1024")
    );
    let layers = vec!["\"host\""; 65].join(",");
    assert!(error_of(&format!(r#"{{"layers": [{layers}]}}"#)).contains("at most 64"));
}

#[test]
fn a_spec_of_many_faults_gets_a_short_answer() {
    let volumes = vec![r#"{"volume": "v", "target": "/v"}"#; 100_000].join(",");
    let json = format!(r#"{{"layers": ["host"], "command": ["true"], "volumes": [{volumes}]}}"#);
    let SpecError::Invalid(problems) = parse(&json).expect_err("too many") else { panic!("it is JSON") };
    assert_eq!(problems.len(), 257);
    assert_eq!(problems[0].to_string(), "volumes: at most 32 are allowed, these are 100000");
    assert_eq!(problems[256].to_string(), "99744 more problems");
}

#[test]
fn globs_that_no_worker_could_compile_are_refused() {
    let of = |globs: &[String]| {
        parse(&serde_json::json!({"layers": ["host"], "outputs": {"paths": globs}}).to_string())
    };
    let error = |globs: &[String]| of(globs).expect_err("refused").to_string();
    assert!(
        error(&["/".to_owned() + &"{a,b}".repeat(65)]).contains("outputs.paths[0]: a glob may have 64 `{`")
    );
    assert!(
        error(&["/".to_owned() + &"a".repeat(1024)]).contains("outputs.paths[0]: a glob may have 1024 bytes")
    );
    assert!(error(&vec!["/".to_owned() + &"{a,b}".repeat(800); 200]).contains("outputs.paths[199]"));
    assert!(of(&["/box/out/**".to_owned(), "/box/{a,b}/[!x]?*".to_owned()]).is_ok());
    let dear = vec!["/".to_owned() + &"?".repeat(1000); 256];
    assert!(error(&dear).contains("outputs.paths: the globs are too large"));
}

#[test]
fn bytes_that_are_not_utf_8_are_not_json() {
    for json in [&b"\xff"[..], b"{\"layers\": [\"host\xff\"]}", b"{\"layers\": [\"host\"], \"\xc3\": 1}"] {
        let error = JobSpec::parse(json).expect_err("not UTF-8");
        assert!(matches!(error, SpecError::NotJson(_)) && error.to_string().contains("UTF-8"), "{error}");
    }
}

#[test]
fn no_message_speaks_of_what_is_behind_the_parser() {
    for (json, _) in BAD {
        let message = error_of(json);
        for word in ["struct ", "Raw", "u64", "u32", "u8", "elements", "sequence", "invalid type"] {
            assert!(!message.contains(word), "{json}\n  says: {message}");
        }
    }
    let long = format!(r#"{{"layers": ["host"], "limits": "{}"}}"#, "x".repeat(10_000));
    assert!(error_of(&long).len() < 200, "{}", error_of(&long));
}

#[test]
fn the_schema_on_file_is_the_one_of_the_types() {
    for (name, schema) in [
        ("job-spec", hutch_proto::schema::job_spec()),
        ("job-result", hutch_proto::schema::job_result()),
        ("event", hutch_proto::schema::event()),
    ] {
        let path = format!("{}/schema/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let text = format!("{}\n", serde_json::to_string_pretty(&schema).expect("json"));
        if std::env::var_os("HUTCH_UPDATE_SCHEMAS").is_some() {
            std::fs::write(&path, &text).expect("write");
        }
        let on_file = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(on_file, text, "{path} is stale: run `HUTCH_UPDATE_SCHEMAS=1 cargo test -p hutch-proto`");
    }
}

#[test]
fn the_schema_takes_what_the_parser_takes() {
    let schema = hutch_proto::schema::job_spec();
    let validator = jsonschema::validator_for(&schema).expect("schema");
    let full = serde_json::from_str(FULL).expect("json");
    assert!(
        validator.is_valid(&full),
        "{:?}",
        validator.iter_errors(&full).map(|e| e.to_string()).collect::<Vec<_>>()
    );
    let bad = serde_json::json!({"layers": ["host"], "comand": ["true"]});
    assert!(!validator.is_valid(&bad));
}

prop_compose! {
    fn any_spec()(
        layers in prop::collection::vec("(dir:/[a-z]{1,8}|image:[a-z]{1,8}|sha256:[0-9a-f]{64})", 1..8),
        command in prop::collection::vec("[^\\x00]{1,20}", 1..5),
        env in prop::collection::btree_map("[A-Z_]{1,8}", "[^\\x00]{0,20}", 0..4),
        cwd in prop::option::of("(/[a-z.]{1,6}[a-z]){1,4}"),
        stdin in prop::option::of(prop::collection::vec(any::<u8>(), 0..64)),
        files in prop::collection::btree_map("/[a-z]{3,8}[0-9]", (prop::collection::vec(any::<u8>(), 0..64), 0u32..0o1000), 0..4),
        wall in prop::option::of(1u64..1_000_000),
        memory in prop::option::of((1u64 << 20)..(1 << 40)),
        priority in 0u8..32,
        attempts in 1u32..100,
        labels in prop::collection::btree_map("[a-z][a-z0-9._-]{0,10}", "[a-z ]{0,10}", 0..4),
        tty: bool,
    ) -> serde_json::Value {
        use base64::Engine as _;
        let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        let mut spec = serde_json::json!({
            "layers": layers, "command": command, "env": env, "priority": priority,
            "max_attempts": attempts, "labels": labels, "tty": tty, "limits": {},
            "files": files.iter().map(|(path, (bytes, mode))| serde_json::json!({
                "path": path, "base64": encode(bytes), "mode": format!("{mode:04o}")
            })).collect::<Vec<_>>(),
        });
        if let Some(cwd) = cwd { spec["cwd"] = cwd.into(); }
        if let Some(stdin) = stdin { spec["stdin"] = serde_json::json!({"base64": encode(&stdin)}); }
        if let Some(wall) = wall { spec["limits"]["wall_time_ms"] = wall.into(); }
        if let Some(memory) = memory { spec["limits"]["memory_bytes"] = memory.into(); }
        spec
    }
}

proptest! {
    #[test]
    fn a_spec_survives_the_wire(json in any_spec()) {
        let spec = JobSpec::parse(json.to_string().as_bytes()).expect("valid");
        let wire = serde_json::to_vec(&spec).expect("json");
        prop_assert_eq!(&spec, &JobSpec::parse(&wire).expect("valid again"));
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let _ = JobSpec::parse(&bytes);
    }

    #[test]
    fn no_field_makes_the_parser_panic(field in "[a-z_]{1,12}", value in "\\PC{0,64}") {
        let _ = JobSpec::parse(serde_json::json!({"layers": [value.clone()], field: value}).to_string().as_bytes());
    }
}

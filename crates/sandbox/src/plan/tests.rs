//! Every decision of a plan, shown whole: `INSTA_UPDATE=always cargo test -p hutch-sandbox plan` writes them anew.

use hutch_proto::{JobSpec, LimitsSpec};

use super::*;

fn config() -> EngineConfig {
    let mut config = EngineConfig::new("/data".into());
    config.allow_host_layer = true;
    config.layer_dirs = vec!["/srv/layers".into()];
    config.allowed_host_paths = vec!["/srv/shared".into()];
    config
}

fn abilities() -> Abilities {
    Abilities {
        egress: Err("pasta is not installed".to_owned()),
        processors: Some([0, 1].into()),
        swap: true,
        hard_limits: HardLimits { open_files: 4096, stack_bytes: 1 << 30, core_bytes: 0 },
        images: Err("no loop devices".to_owned()),
        io: Err("no io controller".to_owned()),
    }
}

fn plan(json: &str) -> Result<JobPlan, Refusal> {
    let spec = JobSpec::parse(json.as_bytes()).expect(json);
    JobPlan::new(&spec, &config(), &abilities())
}

const SPEC: &str = r#"{
    "id": "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34",
    "layers": ["host", "dir:/srv/layers/tools"],
    "env": {"PATH": "/opt/bin::/usr/bin", "LD_LIBRARY_PATH": "/opt/lib"},
    "cwd": "/box",
    "user": "ann:staff",
    "stdin": {"text": "1\n"},
    "files": [{"path": "/box/a.c", "text": "int main;"}],
    "limits": {"memory_bytes": 67108864, "cpu_time_ms": 500},
    "volumes": [{"volume": "cache", "target": "/cache"}, {"host_path": "/srv/shared/data", "target": "/data"}],
    "outputs": {"paths": ["/box/out/**"]},
    "steps": [
        {"name": "build", "command": ["cc", "a.c"], "limits": {"pids": 20}},
        {"name": "run", "command": ["./a.out"], "stdin": {"text": ""}, "env": {"LANG": "C"}, "cwd": "/", "allow_failure": true}
    ]
}"#;

/// The most allocations of parsing a usual spec and of planning it: raise one only for something that is worth it.
const MOST_ALLOCATIONS: (u64, u64) = (46, 52);

#[test]
fn a_plan_allocates_no_more_than_it_did() {
    const USUAL: &[u8] = br#"{"layers": ["host"], "command": ["python3", "main.py"], "cwd": "/box",
        "stdin": {"text": "1 2"}, "files": [{"path": "/box/main.py", "text": "print(3)"}],
        "limits": {"wall_time_ms": 10000, "cpu_time_ms": 5000, "memory_bytes": 268435456}}"#;
    let (config, abilities) = (config(), abilities());
    let spec = JobSpec::parse(USUAL).expect("spec");
    let parsing = allocation_counter::measure(|| drop(JobSpec::parse(USUAL)));
    let planning = allocation_counter::measure(|| drop(JobPlan::new(&spec, &config, &abilities)));
    let counts = (parsing.count_total, planning.count_total);
    assert!(
        counts.0 <= MOST_ALLOCATIONS.0 && counts.1 <= MOST_ALLOCATIONS.1,
        "{counts:?} allocations of parsing and planning, {MOST_ALLOCATIONS:?} at most"
    );
    assert!(counts.0 > 0 && counts.1 > 0, "{counts:?}: nothing was counted");
}

#[test]
fn a_job_is_decided_whole() {
    insta::assert_debug_snapshot!("job", plan(SPEC).expect("plan"));
}

#[test]
fn the_mounts_are_steps_in_order() {
    let mounts = MountPlan {
        layers: 2,
        trees: vec![("/usr".to_owned(), vec![1]), ("/lib64".to_owned(), vec![])],
        targets: vec!["/cache".to_owned()],
    };
    insta::assert_debug_snapshot!(
        "mounts",
        mount_steps(&mounts, Slots { layers: 4, scratch: 8, volumes: 9 }, false)
    );
}

#[test]
fn limits_become_resource_limits() {
    let limits = LimitPolicy::default().resolve(&LimitsSpec::default(), "limits").expect("limits");
    insta::assert_debug_snapshot!("rlimits", rlimits(&limits));
}

/// What cannot be had is refused with the field and what would be right.
#[test]
fn what_cannot_be_had_is_refused() {
    for (json, words) in [
        (r#"{"layers": ["host"]}"#, &["command", "needed"][..]),
        (r#"{"layers": ["dir:/etc"], "command": ["a"]}"#, &["layers[0]", "/etc", "worker.layer_dirs"]),
        (r#"{"layers": ["dir:/srv/layersother"], "command": ["a"]}"#, &["layers[0]", "worker.layer_dirs"]),
        (r#"{"layers": ["image:python"], "command": ["a"]}"#, &["layers[0]", "image:python"]),
        (
            r#"{"layers": ["host"], "command": ["a"], "volumes": [{"host_path": "/etc", "target": "/e"}]}"#,
            &["volumes[0].host_path", "worker.allowed_host_paths"],
        ),
        (r#"{"layers": ["host"], "command": ["a"], "network": "egress"}"#, &["network", "egress"]),
        (
            r#"{"layers": ["host"], "command": ["a"], "limits": {"open_files": 5000}}"#,
            &["limits.open_files", "4096"],
        ),
        (
            r#"{"layers": ["host"], "command": ["a"], "limits": {"disk_bytes": 999999999}}"#,
            &["limits.disk_bytes", "268435456", "no loop devices"],
        ),
        (
            r#"{"layers": ["host"], "steps": [{"name": "x", "command": ["a"], "limits": {"open_files": 5000}}]}"#,
            &["steps[0].limits.open_files", "4096"],
        ),
        (
            r#"{"layers": ["host"], "limits": {"disk_bytes": 70000}, "steps": [{"name": "x", "command": ["a"], "limits": {"disk_bytes": 70001}}]}"#,
            &["steps[0].limits.disk_bytes", "70000", "70001"],
        ),
        (
            r#"{"layers": ["host"], "steps": [{"name": "x", "command": ["a"], "limits": {"disk_inodes": 50}}]}"#,
            &["steps[0].limits.disk_inodes", "100000"],
        ),
    ] {
        let message = plan(json).expect_err(json).message;
        for word in words {
            assert!(message.contains(word), "{json}\n  says: {message}\n  lacks: {word}");
        }
    }
}

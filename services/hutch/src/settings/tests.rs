use std::io::Write as _;

use super::*;

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().expect("file");
    file.write_all(text.as_bytes()).expect("write");
    file
}

fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn load_text(text: &str, pairs: &[(&str, &str)], flags: &Flags) -> anyhow::Result<Loaded> {
    load_with(Some(file(text).path()), env(pairs), flags)
}

fn error_of(text: &str) -> String {
    load_text(text, &[], &Flags::default()).expect_err(text).to_string()
}

#[test]
fn each_layer_beats_the_one_before() {
    let text = "data_dir = \"/srv/h\"\n[worker]\nslots = 2\nqueues = [\"a\"]\n";
    let pairs = [("HUTCH__WORKER__SLOTS", "3"), ("HUTCH__WORKER__QUEUES", "b, c"), ("HUTCH_URL", "x")];
    let flags = Flags::default().set("worker.slots", "--slots", Some(4_u64));
    let loaded = load_text(text, &pairs, &flags).expect("loaded");
    assert_eq!(loaded.settings.worker.slots, 4);
    assert_eq!(loaded.settings.worker.queues, ["b", "c"]);
    assert_eq!(loaded.settings.data_dir, PathBuf::from("/srv/h"));
    assert_eq!(loaded.settings.store_directory(), None);
    let shown = show(&loaded);
    for (key, from) in [
        ("worker.slots = 4 ", "flag --slots"),
        ("worker.queues = [\"b\", \"c\"] ", "env HUTCH__WORKER__QUEUES"),
        ("data_dir = \"/srv/h\" ", "file "),
        ("worker.lease = \"30s\" ", "default"),
        ("# broker.url =", "not set"),
    ] {
        let line =
            shown.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{key}\n{shown}"));
        assert!(line.contains(&format!("# {from}")), "{line}");
    }
}

#[test]
fn data_is_kept_at_an_absolute_path_whoever_names_it() {
    let here = std::env::current_dir().expect("current directory").join("state");
    let flag = Flags::default().set("data_dir", "--data", Some("./state"));
    for (text, pairs, flags) in [
        ("data_dir = \"state\"", &[][..], Flags::default()),
        ("", &[("HUTCH__DATA_DIR", "./state")], Flags::default()),
        ("", &[], flag),
    ] {
        let settings = load_text(text, pairs, &flags).expect("loaded").settings;
        assert_eq!((&settings.data_dir, settings.store_directory()), (&here, None));
    }
    assert!(error_of("data_dir = \"\"").contains("data_dir"));
}

#[test]
fn unknown_keys_are_named_with_what_was_meant() {
    for (text, words) in [
        ("[worker]\nslotz = 1", &["worker.slotz", "worker.slots", ".toml"][..]),
        ("slots = 1", &["`slots`", "worker.slots"]),
        ("[nonsense]\nx = 1", &["nonsense"]),
        ("[worker.max_limits]\nmemory = 1", &["worker.max_limits.memory"]),
        ("[worker.max_limits]\npid = 1", &["worker.max_limits.pid", "worker.max_limits.pids"]),
    ] {
        let error = error_of(text);
        for word in words {
            assert!(error.contains(word), "{text}: {error}");
        }
    }
    let wrong = load_text("", &[("HUTCH__WORKER__SLOTZ", "1")], &Flags::default()).expect_err("slotz");
    assert!(wrong.to_string().contains("env HUTCH__WORKER__SLOTZ"), "{wrong}");
}

#[test]
fn wrong_values_are_named_with_their_key() {
    for (text, words) in [
        ("[worker]\nslots = \"many\"", &["worker.slots", "many"][..]),
        ("[worker]\nslots = 0", &["worker.slots", "1 to 1024"]),
        ("[worker]\nqueues = []", &["worker.queues"]),
        ("[worker]\nqueues = [\"a/b\"]", &["a/b"]),
        ("[worker]\ndrain_grace = \"soon\"", &["worker.drain_grace", "5s"]),
        ("[worker]\nlayer_dirs = [\"x\"]", &["worker.layer_dirs", "absolute"]),
        ("[worker.max_limits]\nmemory_bytes = \"much\"", &["worker.max_limits.memory_bytes", "256MiB"]),
        ("[worker.default_limits]\npids = 9\n[worker.max_limits]\npids = 8", &["default_limits.pids", "8"]),
        ("listen = \"somewhere\"", &["listen", "somewhere", "127.0.0.1:7070"]),
        ("listen = \":7070\"", &["listen", "127.0.0.1:7070"]),
        ("listen = \"127.0.0.1:99999\"", &["listen", "127.0.0.1:7070"]),
        ("store.url = \"ftp://u:secret@h/x\"", &["store.url", "ftp://u:***@h/x", "file:///"]),
        ("store.url = \"file://relative\"", &["store.url", "file:///"]),
        ("broker.url = \"http://u:secret@h\"", &["broker.url", "http://u:***@h", "amqp://"]),
        ("worker.metric_labels = [\"status\"]", &["worker.metric_labels", "`status`", "queue, status"]),
        ("worker.metric_labels = [\"a-b\", \"a.b\"]", &["worker.metric_labels", "`a.b`", "a-b"]),
        ("worker.metric_labels = [\"1x\"]", &["worker.metric_labels", "`1x`"]),
        ("[worker\n", &["config"]),
    ] {
        let error = error_of(text);
        for word in words {
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}

#[test]
fn limits_take_human_units_and_a_default_never_exceeds_its_maximum() {
    let text = "[worker.max_limits]\nmemory_bytes = \"64MiB\"\nwall_time_ms = \"5s\"\npids = 10\n\
                [worker.default_limits]\ncpuset = \"0-1\"\nwall_time_ms = 4000\n";
    let policy = load_text(text, &[], &Flags::default()).expect("loaded").settings.limits().expect("limits");
    let limits = policy.resolve(&hutch_proto::LimitsSpec::default(), "limits").expect("resolved");
    assert_eq!((limits.memory_bytes, limits.wall_time_ms, limits.pids), (64 << 20, 4000, 10));
    assert_eq!(limits.cpuset.as_deref(), Some("0-1"));
}

#[test]
fn no_password_is_shown() {
    for (url, expected) in [
        ("amqp://guest:se/cr@et@127.0.0.1:5672/%2f", "amqp://guest:***@127.0.0.1:5672/%2f"),
        ("amqp://guest@127.0.0.1", "amqp://guest@127.0.0.1"),
        ("amqp://127.0.0.1:5672", "amqp://127.0.0.1:5672"),
    ] {
        let loaded = load_text(&format!("broker.url = \"{url}\""), &[], &Flags::default()).expect("loaded");
        let shown = show(&loaded);
        assert!(shown.contains(&format!("broker.url = \"{expected}\" ")), "{shown}");
        assert_eq!(loaded.settings.broker.url.as_deref(), Some(url), "used as it is");
    }
    let store =
        load_text("store.url = \"s3://key:secret@bucket/p\"", &[], &Flags::default()).expect("loaded");
    assert!(!show(&store).contains("secret"));
}

#[test]
fn addresses_that_services_take_are_taken() {
    for text in [
        "listen = \"localhost:0\"",
        "listen = \"[::1]:7070\"",
        "store.url = \"s3://bucket/prefix\"",
        "store.url = \"memory:///\"",
        "broker.url = \"amqp://u:p@h:5672/%2f?heartbeat=30\"",
        "worker.metric_labels = [\"tenant\", \"a-b\"]",
    ] {
        assert!(load_text(text, &[], &Flags::default()).is_ok(), "{text}");
    }
}

#[test]
fn a_file_that_is_named_must_be_there() {
    let error = load(Some(Path::new("/nowhere/hutch.toml")), &Flags::default()).expect_err("not there");
    assert!(error.to_string().contains("/nowhere/hutch.toml"));
}

#[test]
fn data_lives_where_the_user_keeps_state() {
    let none = |_: &str| None;
    assert_eq!(default_data_dir(none, true), PathBuf::from("/var/lib/hutch"));
    let home = |name: &str| (name == "HOME").then(|| "/home/u".to_owned());
    assert_eq!(default_data_dir(home, false), PathBuf::from("/home/u/.local/state/hutch"));
    let state = |name: &str| Some(format!("/x/{name}"));
    assert_eq!(default_data_dir(state, false), PathBuf::from("/x/XDG_STATE_HOME/hutch"));
}

//! Those who run hutch can see it: metrics, rules and dashboards, against a real Prometheus.
//!
//! Prometheus and promtool are Debian's; a dashboard is held against it by asking each of its expressions.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hutch_tests::house::{House, Served};
use hutch_tests::skip;
use serde_json::{Value, json};

/// Longer than a busy machine takes to have everything scraped.
const PATIENCE: Duration = Duration::from_secs(240);
/// What stands for `$__rate_interval`: longer than the test.
const WINDOW: &str = "10m";

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// Whether Prometheus is installed; if not, says so.
fn has_prometheus(test: &str) -> bool {
    let installed = Path::new("/usr/bin/promtool").exists() && Path::new("/usr/bin/prometheus").exists();
    if !installed {
        skip(test, "Debian's package prometheus is not installed");
    }
    installed
}

fn promtool(arguments: &[&str]) -> Output {
    Command::new("promtool").args(arguments).output().expect("promtool")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn files(directory: &str, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(deploy(directory)).expect("directory").flatten().map(|entry| entry.path());
    let found: Vec<_> = entries.filter(|path| path.extension().is_some_and(|is| is == ending)).collect();
    assert!(!found.is_empty(), "no {ending} in {directory}");
    found
}

#[test]
fn rules_and_config_are_right() {
    if !has_prometheus("rules_and_config_are_right") {
        return;
    }
    let config = deploy("prometheus/prometheus.yml");
    let checked = promtool(&["check", "config", config.to_str().expect("utf-8")]);
    assert!(checked.status.success() && said(&checked).contains("2 rule files"), "{}", said(&checked));
    for test in files("prometheus/tests", "yml") {
        let tested = promtool(&["test", "rules", test.to_str().expect("utf-8")]);
        assert!(tested.status.success(), "{}", said(&tested));
    }
}

/// The values of `key: value` lines.
fn values(text: &str, key: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| Some(line.trim().trim_start_matches("- ").strip_prefix(key)?.trim().to_owned()))
        .collect()
}

#[test]
fn each_alert_has_a_test_and_a_runbook() {
    let alerts = fs::read_to_string(deploy("prometheus/rules/alerts.yml")).expect("alerts");
    let tests = fs::read_to_string(deploy("prometheus/tests/alerts.yml")).expect("tests");
    let document = fs::read_to_string(deploy("../docs/operations.md")).expect("operations");
    let (names, links) = (values(&alerts, "alert:"), values(&alerts, "runbook_url:"));
    assert!(names.len() >= 10 && names.len() == links.len(), "{names:?} {links:?}");
    for (name, link) in names.iter().zip(&links) {
        assert!(document.lines().any(|line| line == format!("### {name}")), "docs/operations.md: no {name}");
        let anchor = format!("docs/operations.md#{}", name.to_lowercase());
        assert!(link.ends_with(&anchor), "{name}: {link}, not {anchor}");
        assert!(tests.contains(&format!("alertname=\"{name}\"")), "{name} is not tested");
    }
}

/// A Prometheus of this test's own, on a port that is free.
struct Prometheus {
    child: Child,
    url: String,
}

impl Prometheus {
    fn scraping(house: &House, targets: &[&Served]) -> Self {
        let hosts: Vec<_> = targets.iter().map(|served| served.url.trim_start_matches("http://")).collect();
        let rules = deploy("prometheus/rules/*.yml");
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [rules],
            "scrape_configs": [{"job_name": "hutch", "static_configs": [{"targets": hosts}]}],
        });
        let config = house.file("prometheus.yml", &config.to_string());
        let mut child = Command::new("prometheus")
            .arg(format!("--config.file={config}"))
            .arg(format!("--storage.tsdb.path={}", house.path("tsdb").display()))
            .arg("--web.listen-address=127.0.0.1:0")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("prometheus");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr")).lines().map_while(Result::ok);
        let address = lines.by_ref().find_map(|line| {
            line.contains("\"Listening on\"").then(|| line.rsplit("address=").next().map(str::to_owned))?
        });
        // It blocks when nobody reads what it says.
        std::thread::spawn(move || lines.for_each(drop));
        let address = address.expect("prometheus says where it listens");
        Self { child, url: format!("http://{address}") }
    }

    /// What an expression is now: a line for each series. An error while it is not yet up.
    fn ask(&self, expression: &str) -> Result<Vec<String>, String> {
        let output = promtool(&["query", "instant", &self.url, expression]);
        if !output.status.success() {
            return Err(said(&output));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().filter(|line| line.contains("=>")).map(str::to_owned).collect())
    }

    /// Whether an expression has data, of which not all is no number.
    fn has_data(&self, expression: &str) -> Result<bool, String> {
        Ok(self.ask(expression)?.iter().any(|line| !line.contains("=> NaN")))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `label_values(SERIES, LABEL)` as an expression that has a series for each value.
fn variable(query: &str) -> String {
    let inner = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
    let (series, label) =
        inner.and_then(|inner| inner.rsplit_once(", ")).expect("label_values(SERIES, LABEL)");
    format!("group by ({label}) ({series})")
}

/// Every question of the dashboards, with where it is asked.
fn questions(instance: &str) -> BTreeMap<String, String> {
    let mut asked = BTreeMap::new();
    for path in files("grafana/dashboards", "json") {
        let text = fs::read_to_string(&path).expect("dashboard");
        let board: Value = serde_json::from_str(&text).expect("JSON");
        let title = board["title"].as_str().expect("title");
        let fill = |expression: &str| {
            expression
                .replace("$__rate_interval", WINDOW)
                .replace("instance=\"$instance\"", &format!("instance=\"{instance}\""))
                .replace("$instance", ".*")
                .replace("$queue", ".*")
                .replace("$slot", ".*")
        };
        for of in board["templating"]["list"].as_array().expect("variables") {
            let query = of["query"]["query"].as_str().expect("query");
            asked.insert(format!("{title} / variable {}", of["name"]), fill(&variable(query)));
        }
        for panel in board["panels"].as_array().expect("panels") {
            assert_eq!(panel["datasource"]["uid"], "hutch-prometheus", "{title} / {}", panel["title"]);
            for target in panel["targets"].as_array().expect("targets") {
                let expression = fill(target["expr"].as_str().expect("expression"));
                assert!(!expression.contains('$'), "{title}: an unknown variable in {expression}");
                asked.insert(format!("{title} / {} {}", panel["title"], target["refId"]), expression);
            }
        }
    }
    asked
}

/// Jobs that end in several ways, and three for two slots that run until they are killed with the service.
fn load(served: &Served) {
    let submit = |job: &Value| {
        let taken = served.post("/v1/jobs", job);
        assert!(taken["id"].is_string(), "{taken}");
    };
    let long = json!({"layers": ["host"], "limits": {"wall_time_ms": 600_000, "cpu_millis": 50},
        "command": ["sh", "-c", "head -c 1000000 /dev/zero > f; while :; do :; done"]});
    let short = |script: &str| {
        json!({"layers": ["host"], "command": ["sh", "-c", script],
            "limits": {"wall_time_ms": 60_000, "memory_bytes": 33_554_432}})
    };
    submit(&long);
    for script in ["true", "exit 3", "kill -SEGV $$", "head -c 100000000 /dev/zero > /tmp/f", "echo out"] {
        let result = served.post("/v1/jobs?wait_ms=120000", &short(script));
        assert!(result["status"].is_string(), "{result}");
    }
    submit(&long);
    // It waits, for all slots are full.
    submit(&long);
}

#[test]
fn every_panel_of_every_dashboard_has_data() {
    if !has_prometheus("every_panel_of_every_dashboard_has_data") {
        return;
    }
    let Some(first) = House::with_sandboxes() else { return };
    let second = House::new();
    let served = [&first, &second].map(|house| house.serve(&["up", "--slots", "2"]));
    let prometheus = Prometheus::scraping(&first, &served.each_ref());
    // A counter that is first seen with a value has not grown: each is seen at 0 first, and then again.
    let begun = Instant::now();
    while prometheus.ask("count(hutch_slots) == 2").map(|lines| lines.len()) != Ok(1) {
        assert!(begun.elapsed() < PATIENCE, "nothing is scraped");
        std::thread::sleep(Duration::from_millis(200));
    }
    served.iter().for_each(load);

    let instance = served[0].url.trim_start_matches("http://");
    let mut open = questions(instance);
    assert!(open.len() > 60, "only {} questions", open.len());
    if !served[0].get("/metrics").contains("hutch_cgroup_pressure_seconds_total{") {
        skip("the dashboards' panel of pressure", "this kernel counts no pressure for the cgroups of jobs");
        open.retain(|_, expression| !expression.contains("hutch_cgroup_pressure_seconds_total"));
    }
    let begun = Instant::now();
    while !open.is_empty() {
        assert!(begun.elapsed() < PATIENCE, "no data: {open:#?}");
        open.retain(|place, expression| {
            !prometheus.has_data(expression).unwrap_or_else(|error| panic!("{place}: {expression}: {error}"))
        });
        std::thread::sleep(Duration::from_millis(500));
    }
    for alert in ["HutchDown", "HutchBrokerUnreachable", "HutchJobsLost"] {
        let firing = prometheus.ask(&format!("ALERTS{{alertname=\"{alert}\"}}"));
        assert_eq!(firing.as_deref(), Ok(&[][..]), "{alert}");
    }
}

#[test]
fn metrics_are_as_prometheus_wants_them() {
    if !has_prometheus("metrics_are_as_prometheus_wants_them") {
        return;
    }
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up", "--slots", "2"]);
    load(&served);
    let begun = Instant::now();
    // A job that was taken is not yet one that has written its file of 1 MB to memory.
    let text = loop {
        let text = served.get("/metrics");
        let rows = text.lines().filter_map(|line| line.strip_prefix("hutch_cgroup_memory_file_bytes{"));
        let bytes = rows.filter_map(|row| row.rsplit(' ').next()?.parse::<f64>().ok());
        if bytes.fold(0.0, f64::max) >= 1e6 {
            break text;
        }
        assert!(begun.elapsed() < PATIENCE, "the file is not seen:\n{text}");
        std::thread::sleep(Duration::from_millis(100));
    };
    let mut check = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    check.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("write");
    let checked = check.wait_with_output().expect("promtool");
    assert!(checked.status.success() && said(&checked).is_empty(), "{}\n{text}", said(&checked));
    for name in CONTRACT {
        assert!(text.lines().any(|line| line.starts_with(&format!("# TYPE {name} "))), "{name}\n{text}");
    }
}

/// The names that users rely on, and more of the same kind. Pressure is there where the kernel counts it.
const CONTRACT: &[&str] = &[
    "hutch_jobs_total",
    "hutch_jobs_running",
    "hutch_slots",
    "hutch_job_queue_seconds",
    "hutch_job_wall_seconds",
    "hutch_job_cpu_seconds",
    "hutch_job_memory_peak_bytes",
    "hutch_sandbox_setup_seconds",
    "hutch_sandbox_teardown_seconds",
    "hutch_cgroup_memory_bytes",
    "hutch_cgroup_memory_anonymous_bytes",
    "hutch_cgroup_memory_file_bytes",
    "hutch_cgroup_memory_limit_bytes",
    "hutch_cgroup_cpu_seconds_total",
    "hutch_cgroup_cpu_throttled_seconds_total",
    "hutch_cgroup_pids",
    "hutch_cgroup_io_bytes_total",
    "hutch_broker_connected",
    "hutch_broker_reconnects_total",
    "hutch_redeliveries_total",
    "hutch_layer_cache_hits_total",
    "hutch_layer_cache_misses_total",
    "hutch_layer_store_bytes",
    "hutch_reaped_sandboxes_total",
    "hutch_build_info",
    "hutch_http_requests_total",
    "hutch_http_request_seconds",
    "hutch_queue_depth",
];

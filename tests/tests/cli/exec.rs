//! `hutch exec`: more programs in a running job, through gateway, queue, worker and engine.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hutch_tests::broker::Broker;
use hutch_tests::house::{Done, House, Served};
use hutch_tests::person;
use nix::sys::signal::Signal;
use serde_json::json;

/// How long anything may take on a machine with much to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client, and a job that runs until it is called off.
struct Running<'a> {
    house: &'a House,
    url: String,
    id: String,
}

impl<'a> Running<'a> {
    fn start(house: &'a House, gateway: &Served) -> Self {
        let job = json!({"layers": ["host"], "env": {"OWN": "job"}, "limits": {"wall_time_ms": 600_000, "pids": 40},
            "command": ["sh", "-c", "echo begun; exec sleep 1000"]});
        let id = house.hutch(&["submit", "--url", &gateway.url, &house.file("long.json", &job.to_string())]);
        assert_eq!(id.code, 0, "{id:?}");
        let running = Self { house, url: gateway.url.clone(), id: id.stdout.trim().to_owned() };
        let begun = Instant::now();
        while gateway.get_json(&format!("/v1/jobs/{}", running.id))["state"] != "running" {
            assert!(begun.elapsed() < PATIENCE, "the job does not run");
            std::thread::sleep(Duration::from_millis(20));
        }
        running
    }

    fn arguments<'b>(&'b self, before: &[&'b str], command: &[&'b str]) -> Vec<&'b str> {
        [&["exec", "--url", self.url.as_str()], before, &[self.id.as_str(), "--"], command].concat()
    }

    fn exec(&self, command: &[&str]) -> Done {
        self.house.hutch_with_stdin(&self.arguments(&[], command), b"")
    }

    /// It ends as a shell's would, and both streams and the input go through whole.
    fn is_served(&self) {
        let done = self.exec(&["sh", "-c", "echo $OWN; echo err >&2; exit 7"]);
        assert_eq!(
            (done.code, done.stdout.as_str(), done.stderr.as_str()),
            (7, "job\n", "err\n"),
            "{done:?}"
        );
        for (command, code) in [("no-such-program", 127), ("/etc/passwd", 126), ("true", 0)] {
            assert_eq!(self.exec(&[command]).code, code, "{command}");
        }
        assert_eq!(self.exec(&["sh", "-c", "kill -TERM $$"]).code, 143);
        let with = self.arguments(&["-e", "A=b", "-w", "/tmp"], &["sh", "-c", "echo $A $PWD"]);
        assert_eq!(self.house.hutch_with_stdin(&with, b"").stdout, "b /tmp\n");
        let input = vec![b'x'; 3_000_000];
        let counted = self.house.hutch_with_stdin(&self.arguments(&[], &["wc", "-c"]), &input);
        assert_eq!(counted.stdout.trim(), "3000000", "{counted:?}");
        let output = self.exec(&["head", "-c", "3000000", "/dev/zero"]);
        assert_eq!((output.code, output.stdout.len()), (0, 3_000_000));
    }

    /// What its own processes are, as the job sees them.
    fn processes(&self, name: &str) -> usize {
        let listed = self.exec(&["sh", "-c", &format!("cat /proc/[0-9]*/comm | grep -cx {name}")]);
        listed.stdout.trim().parse().unwrap_or_else(|_| panic!("{listed:?}"))
    }

    /// A command that is killed has its program ended: it cannot say anything any more.
    fn ends_with_its_command(&self) {
        let mut command =
            self.house.command(&self.arguments(&[], &["sh", "-c", "echo begun; exec tail -f /dev/null"]));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("spawn");
        let mut begun = [0; 6];
        child.stdout.as_mut().expect("stdout").read_exact(&mut begun).expect("begun");
        assert_eq!(self.processes("tail"), 1);
        child.kill().expect("kill");
        child.wait().expect("ended");
        let ended = Instant::now();
        while self.processes("tail") > 0 {
            assert!(ended.elapsed() < PATIENCE, "the program goes on");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A job that ends takes the programs in it along; after it there is nothing to enter.
    fn ends_with_its_job(&self, gateway: &Served) {
        let mut command =
            self.house.command(&self.arguments(&[], &["sh", "-c", "echo begun; exec sleep 1000"]));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("spawn");
        let mut begun = [0; 6];
        child.stdout.as_mut().expect("stdout").read_exact(&mut begun).expect("begun");
        assert_eq!(self.house.hutch(&["cancel", "--url", &self.url, &self.id]).code, 0);
        assert_eq!(child.wait().expect("ended").code(), Some(137));
        let begun = Instant::now();
        while gateway.get_json(&format!("/v1/jobs/{}", self.id))["state"] != "finished" {
            assert!(begun.elapsed() < PATIENCE, "the job does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        let late = self.exec(&["true"]);
        assert!(late.code == 125 && late.stderr.contains("has finished"), "{late:?}");
    }
}

#[test]
fn a_program_is_brought_into_a_job_of_the_embedded_queue() {
    let Some(house) = House::with_sandboxes() else { return };
    let served = house.serve(&["up", "--slots", "1"]);
    let running = Running::start(&house, &served);
    running.is_served();
    person::works(&house, &running.arguments(&["--tty"], &["sh", "-c", person::SHELL]), &[]);
    running.ends_with_its_command();

    let unknown = "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34";
    let done = house.hutch(&["exec", "--url", &served.url, unknown, "--", "true"]);
    assert!(done.code == 125 && done.stderr.contains("no job"), "{done:?}");
    let waits = house.file("next.json", r#"{"layers": ["host"], "command": ["true"]}"#);
    let waits = house.hutch(&["submit", "--url", &served.url, &waits]).stdout;
    let done = house.hutch(&["exec", "--url", &served.url, waits.trim(), "--", "true"]);
    assert!(done.code == 125 && done.stderr.contains("waits"), "{done:?}");
    let plain = served.get_json(&format!("/v1/jobs/{}/exec", running.id));
    assert!(
        plain["status"] == 400 && plain["detail"].as_str().is_some_and(|text| text.contains("WebSocket")),
        "{plain}"
    );
    running.ends_with_its_job(&served);
}

#[test]
fn a_program_is_brought_into_a_job_over_the_broker() {
    let Some(house) = House::with_sandboxes() else { return };
    let broker = Broker::start();
    let url = broker.url();
    let store = format!("file://{}", house.path("store").display());
    let data: Vec<_> = ["w", "v", "g"].map(|name| house.path(name).display().to_string()).into();
    let worker = |data: &str| {
        let allowed = [("HUTCH__WORKER__ALLOW_HOST_LAYER", "true")];
        house.serve_with(
            &["worker", "--broker", &url, "--store", &store, "--data", data, "--slots", "1"],
            &allowed,
        )
    };
    let workers = [worker(&data[0]), worker(&data[1])];
    let gateway = house.serve(&["gateway", "--broker", &url, "--store", &store, "--data", &data[2]]);
    let running = Running::start(&house, &gateway);
    running.is_served();
    person::works(&house, &running.arguments(&["--tty"], &["sh", "-c", person::SHELL]), &[]);
    running.ends_with_its_command();
    running.ends_with_its_job(&gateway);
    for served in workers.iter().chain([&gateway]) {
        served.signal(Signal::SIGTERM);
    }
    for served in workers.into_iter().chain([gateway]) {
        assert_eq!(served.end().0, 0);
    }
}

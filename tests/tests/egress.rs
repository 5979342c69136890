//! `network: "egress"`: what a job reaches of an internet that is made of network namespaces, and what it does not.
//!
//! One namespace is the host that hutch runs on, another is everything else: public addresses, private ones, the metadata
//! service, and a name server. What the host itself reaches is the control.

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hutch_tests::house::{House, Served};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// How long anything may take on a machine with much to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Addresses of the rest of the world: whether a job may reach each.
const WORLD: [(&str, bool); 9] = [
    ("93.184.216.34", true),
    ("2606:2800::34", true),
    ("10.9.9.9", false),
    ("192.168.77.7", false),
    ("100.64.1.1", false),
    ("169.254.169.254", false),
    ("168.63.129.16", false),
    ("fd77::7", false),
    ("2002:a09:909::1", false),
];
/// Addresses of the host itself.
const OWN: [&str; 3] = ["93.184.216.1", "2606:2800::1", "127.0.0.1"];

/// Answers every connection on port 8080, and every question for a name with the first address of the world.
const SERVER: &str = r#"
import socket, sys, threading
def tcp(family, any):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((any, 8080)); s.listen(64)
    def serve():
        while True:
            c, _ = s.accept(); c.sendall(b"hello"); c.close()
    threading.Thread(target=serve, daemon=True).start()
tcp(socket.AF_INET, "0.0.0.0"); tcp(socket.AF_INET6, "::")
names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); names.bind((sys.argv[1], 53))
print("ready", flush=True)
while True:
    q, who = names.recvfrom(512)
    end = q.index(b"\0", 12) + 5
    wants_v4 = q[end - 4:end - 2] == b"\0\1"
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + bytes([93, 184, 216, 34]) if wants_v4 else b""
    names.sendto(q[:2] + b"\x81\x80\0\1" + (b"\0\1" if wants_v4 else b"\0\0") + b"\0\0\0\0" + q[12:end] + answer, who)
"#;

/// Says of each address whether something answers there.
const PROBE: &str = r#"
import json, socket, sys
def answers(address):
    s = None
    try:
        s = socket.create_connection((address, 8080), timeout=20)
        return s.recv(5) == b"hello"
    except OSError:
        return False
print(json.dumps({a: answers(a) for a in sys.argv[1:]}))
"#;

fn sh(script: &str) {
    let done = Command::new("sh").args(["-ec", script]).output().expect("sh");
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Two network namespaces, and who answers in them.
struct World {
    name: String,
    servers: Vec<Child>,
}

impl World {
    /// None, said aloud, where this kernel or user cannot make it.
    fn new(house: &House) -> Option<Self> {
        static WORLDS: AtomicUsize = AtomicUsize::new(0);
        // An interface has a name of 15 characters.
        let name = format!("h{}x{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        for (program, package) in [("pasta", "passt"), ("nft", "nftables"), ("ip", "iproute2")] {
            if !Command::new("sh")
                .args(["-c", &format!("command -v {program}")])
                .stdout(Stdio::null())
                .status()
                .is_ok_and(|s| s.success())
            {
                hutch_tests::skip("a way out", &format!("{program} is not installed ({package})"));
                return None;
            }
        }
        let made = Command::new("ip").args(["netns", "add", &format!("{name}h")]).status();
        if !made.is_ok_and(|status| status.success()) {
            hutch_tests::skip("a way out", "no network namespaces can be named here");
            return None;
        }
        let mut world = Self { name: name.clone(), servers: Vec::new() };
        let addresses: String = WORLD[2..]
            .iter()
            .map(|(address, _)| {
                let bits = if address.contains(':') { 128 } else { 32 };
                format!("$W ip addr add {address}/{bits} dev {name}w nodad 2>/dev/null || $W ip addr add {address}/{bits} dev {name}w\n")
            })
            .collect();
        sh(&format!(
            "ip netns add {name}w
             H='nsenter --net=/run/netns/{name}h'; W='nsenter --net=/run/netns/{name}w'
             ip link add {name}h type veth peer name {name}w
             ip link set {name}h netns {name}h; ip link set {name}w netns {name}w
             $H ip link set lo up; $W ip link set lo up
             $H ip addr add 93.184.216.1/24 dev {name}h; $H ip addr add 2606:2800::1/64 dev {name}h nodad
             $W ip addr add 93.184.216.34/24 dev {name}w; $W ip addr add 2606:2800::34/64 dev {name}w nodad
             {addresses}
             $H ip link set {name}h up; $W ip link set {name}w up
             $H ip route add default via 93.184.216.34; $H ip -6 route add default via 2606:2800::34
             $W ip route add default via 93.184.216.1; $W ip -6 route add default via 2606:2800::1"
        ));
        let server = house.file("server.py", SERVER);
        for (side, names) in [("h", "127.0.0.1"), ("w", "10.9.9.9")] {
            let mut child = world
                .inside(side, "python3")
                .arg(&server)
                .arg(names)
                .stdout(Stdio::piped())
                .spawn()
                .expect("server");
            let mut line = String::new();
            std::io::BufRead::read_line(
                &mut std::io::BufReader::new(child.stdout.as_mut().expect("stdout")),
                &mut line,
            )
            .expect("ready");
            world.servers.push(child);
            assert_eq!(line, "ready\n");
        }
        std::fs::write(house.path("resolv.conf"), "nameserver 10.9.9.9\n").expect("write");
        Some(world)
    }

    fn namespace(&self, side: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}{side}", self.name))
    }

    fn inside(&self, side: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace(side).display())).args(["--", program]);
        command
    }

    /// A command of hutch on the host of this world, which asks the world's name server.
    fn hutch(&self, house: &House, arguments: &[&str]) -> Command {
        let mut command = self.inside("h", "unshare");
        let script =
            format!("mount --bind {} /etc/resolv.conf; exec \"$@\"", house.path("resolv.conf").display());
        command
            .args(["--mount", "--", "sh", "-ec", &script, "sh"])
            .arg(hutch_tests::hutch::binary())
            .args(arguments);
        command.env("HUTCH__DATA_DIR", house.path("data")).current_dir(house.path("."));
        command
    }

    /// How many processes have a namespace of this host's, and are no servers of its own.
    fn processes(&self) -> Vec<String> {
        let inode = std::fs::metadata(self.namespace("h")).expect("namespace").ino();
        let own: Vec<String> = self.servers.iter().map(|child| child.id().to_string()).collect();
        let all = std::fs::read_dir("/proc").expect("proc").flatten();
        all.filter(|entry| std::fs::metadata(entry.path().join("ns/net")).is_ok_and(|ns| ns.ino() == inode))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|pid| !own.contains(pid))
            .map(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
            })
            .collect()
    }

    fn nothing_is_left(&self) {
        let begun = Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "left: {left:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        for side in ["h", "w"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}{side}", self.name)]).status();
        }
    }
}

fn everywhere() -> Vec<&'static str> {
    WORLD.iter().map(|(address, _)| *address).chain(OWN).collect()
}

fn job(network: &str) -> Value {
    let command = [vec!["python3", "-c", PROBE], everywhere()].concat();
    json!({"layers": ["host"], "command": command, "network": network, "limits": {"wall_time_ms": 300_000}})
}

/// What a job found, by its result.
fn found(result: &Value) -> Value {
    let text = result["stdout"]["text"].as_str().unwrap_or_default();
    serde_json::from_str(text).unwrap_or_else(|_| panic!("{result}"))
}

fn run(world: &World, house: &House, job: &Value, settings: &[(&str, &str)]) -> Value {
    let spec = house.file("job.json", &job.to_string());
    let done =
        world.hutch(house, &["run", "--json", &spec]).envs(settings.iter().copied()).output().expect("hutch");
    serde_json::from_slice(&done.stdout).unwrap_or_else(|_| panic!("{done:?}"))
}

#[test]
fn a_job_reaches_the_public_internet_and_nothing_else() {
    let Some(house) = House::with_sandboxes() else { return };
    let Some(world) = World::new(&house) else { return };
    // The host reaches all of it.
    let control =
        world.inside("h", "python3").args(["-c", PROBE]).args(everywhere()).output().expect("probe");
    let control: Value = serde_json::from_slice(&control.stdout).expect("json");
    for address in everywhere() {
        assert_eq!(control[address], true, "the control does not reach {address}: {control}");
    }

    let reached = found(&run(&world, &house, &job("egress"), &[]));
    for (address, may) in WORLD {
        assert_eq!(reached[address], may, "{address}: {reached}");
    }
    for address in OWN {
        assert_eq!(reached[address], false, "{address}: {reached}");
    }
    world.nothing_is_left();

    // The config opens one address for one port, closes a public one, and both are held to.
    let rules = [
        ("HUTCH__WORKER__EGRESS__ALLOW", "10.9.9.9:8080, 192.168.77.0/24:1, [fd77::/16]:8080"),
        ("HUTCH__WORKER__EGRESS__DENY", "93.184.216.34"),
    ];
    let reached = found(&run(&world, &house, &job("egress"), &rules));
    for (address, may) in [
        ("10.9.9.9", true),
        ("fd77::7", true),
        ("192.168.77.7", false),
        ("93.184.216.34", false),
        ("2606:2800::34", true),
    ] {
        assert_eq!(reached[address], may, "{address}: {reached}");
    }
    let refused = run(&world, &house, &job("egress"), &[("HUTCH__WORKER__EGRESS__ENABLED", "false")]);
    assert_eq!(
        (&refused["status"], &refused["reason"]),
        (&json!("rejected"), &json!("spec_invalid")),
        "{refused}"
    );
    assert!(
        refused["message"].as_str().is_some_and(|text| text.contains("worker.egress.enabled")),
        "{refused}"
    );
}

/// Names are asked for where the host asks; the rules cannot be changed from inside, be it by the sandbox's root; nothing
/// leads in; every step of a job has the way.
#[test]
fn names_are_resolved_and_the_rules_stay() {
    let Some(house) = House::with_sandboxes() else { return };
    let Some(world) = World::new(&house) else { return };
    let named = json!({"layers": ["host"], "network": "egress", "steps": [
        {"name": "one", "command": ["python3", "-c", "import socket; print(socket.gethostbyname('anything.example'))"]},
        {"name": "two", "command": ["python3", "-c", "import socket; print(socket.create_connection(('anything.example', 8080), 20).recv(5))"]}]});
    let result = run(&world, &house, &named, &[]);
    assert_eq!(result["stdout"]["text"], "93.184.216.34\nb'hello'\n", "{result}");

    let root = "for what in 'nft flush ruleset' 'ip link set eth0 down' 'ip route add 10.0.0.0/8 dev eth0' 'ip netns add x'; do \
                $what 2>/dev/null && echo \"$what worked\"; done; grep -c . /proc/net/route; exit 0";
    let result = run(
        &world,
        &house,
        &json!({"layers": ["host"], "network": "egress", "user": "root", "command": ["sh", "-c", root]}),
        &[],
    );
    assert_eq!(result["stdout"]["text"], "3\n", "{result}");

    // A file of the job's own is left as it is.
    let own = json!({"layers": ["host"], "network": "egress", "command": ["cat", "/etc/resolv.conf"],
        "files": [{"path": "/etc/resolv.conf", "text": "nameserver 192.0.2.53\n"}]});
    assert_eq!(run(&world, &house, &own, &[])["stdout"]["text"], "nameserver 192.0.2.53\n");
    world.nothing_is_left();
}

/// The engine of a service has no network of its own, and its jobs have a way out all the same; it goes with whoever made it.
#[test]
fn a_service_s_jobs_have_a_way_out_that_goes_with_the_service() {
    let Some(house) = House::with_sandboxes() else { return };
    let Some(world) = World::new(&house) else { return };
    let served = Served::start(world.hutch(&house, &["up", "--slots", "2"]));
    let client = |arguments: &[&str]| {
        let done = world.hutch(&house, arguments).env("HUTCH_URL", &served.url).output().expect("hutch");
        assert!(done.status.success(), "{done:?}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let spec = house.file("job.json", &job("egress").to_string());
    let result: Value = serde_json::from_str(&client(&["submit", "--wait", &spec])).expect("json");
    let reached = found(&result);
    assert_eq!((&reached["93.184.216.34"], &reached["10.9.9.9"]), (&json!(true), &json!(false)), "{reached}");

    let long = json!({"layers": ["host"], "network": "egress", "command": ["sleep", "1000"], "limits": {"wall_time_ms": 900_000}});
    client(&["submit", &house.file("long.json", &long.to_string())]);
    let begun = Instant::now();
    while !world.processes().iter().any(|process| process.contains("pasta")) {
        assert!(begun.elapsed() < PATIENCE, "no way out is made");
        std::thread::sleep(Duration::from_millis(20));
    }
    served.signal(Signal::SIGKILL);
    let _ = served.end();
    world.nothing_is_left();
}

/// With `none`, not a packet leaves: what the host's kernel has counted stays.
#[test]
fn without_a_way_out_no_packet_leaves() {
    let Some(house) = House::with_sandboxes() else { return };
    let Some(world) = World::new(&house) else { return };
    // With the sixth version the kernel has something to say by itself now and then.
    let quiet =
        world.inside("h", "sh").args(["-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"]).status();
    assert!(quiet.is_ok_and(|status| status.success()));
    // OutRequests of proc(5)'s net/snmp: IP packets, of whatever protocol.
    let sent = || {
        let shown = world.inside("h", "cat").arg("/proc/net/snmp").output().expect("cat");
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        let mut lines = text.lines().filter(|line| line.starts_with("Ip: ")).map(str::split_whitespace);
        let (mut names, mut counts) = (lines.next().expect("names"), lines.next().expect("counts"));
        let place = names.position(|name| name == "OutRequests").expect("OutRequests");
        counts.nth(place).and_then(|count| count.parse::<u64>().ok()).expect("a number")
    };
    let before = sent();
    let nothing = found(&run(&world, &house, &job("none"), &[]));
    assert!(WORLD.iter().all(|(address, _)| nothing[*address] == false), "{nothing}");
    assert_eq!(sent(), before, "packets left");
    run(&world, &house, &job("egress"), &[]);
    assert!(sent() > before, "the control sends nothing");
}

/// A port of the host's that the tests found free is reached by nobody from inside.
#[test]
fn nothing_of_the_host_s_loopback_is_inside() {
    let Some(house) = House::with_sandboxes() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let probe = format!(
        "import socket\ntry:\n  socket.create_connection(('127.0.0.1', {port}), 5); print('reached')\nexcept OSError as e: print(e.errno)"
    );
    let spec = json!({"layers": ["host"], "network": "egress", "command": ["python3", "-c", probe]});
    let done = house.hutch_with_stdin(&["run", "--json", "-"], spec.to_string().as_bytes());
    let result = done.json();
    if result["reason"] == "spec_invalid" {
        hutch_tests::skip("loopback with a way out", result["message"].as_str().unwrap_or_default());
        return;
    }
    assert_eq!(result["stdout"]["text"], "111\n", "{result}");
}

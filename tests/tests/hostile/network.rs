//! What of the host, and of other jobs, is reached without a file.

use std::io::Write as _;
use std::net::{TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Stdio};
use std::time::Duration;

use hutch_sandbox::Defence;
use hutch_tests::programs::{self, Program};
use serde_json::json;

use crate::attack::{Attack, Outcome};
use crate::site::{Site, hostile, hostile_outside, text};

/// Lines that end with OK.
fn worked(said: &str) -> Vec<String> {
    said.lines().filter(|line| line.contains(" OK")).map(str::to_owned).collect()
}

#[test]
fn a28_abstract_sockets_of_the_host() {
    let name = format!("hutch-canary-{}", std::process::id());
    let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let words = ["connect-abstract", name.as_str()];
    Attack::new("28: abstract unix sockets of the host", "network namespace", |site| {
        Outcome::of(&worked(&site.hostile(&words, &json!({"user": "root"}))), "ECONNREFUSED")
    })
    .control(|| {
        let said = hostile_outside(&words)?;
        if worked(&said).is_empty() { Err(said) } else { Ok("it is reached".to_owned()) }
    })
    .bites_without(&[Defence::NetworkNamespace])
    .run();
}

/// The metadata service, private ranges, a name server, and this host by its own address.
const ELSEWHERE: &[&str] = &["169.254.169.254", "80", "10.0.0.1", "80", "192.168.0.1", "80", "1.1.1.1", "53"];

fn own_address() -> Option<String> {
    // No packet is sent: it only asks which address would be used.
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("1.1.1.1:53").ok()?;
    Some(socket.local_addr().ok()?.ip().to_string())
}

#[test]
fn a29_addresses_beyond_the_sandbox() {
    let streams = TcpListener::bind("0.0.0.0:0").unwrap();
    let datagrams = UdpSocket::bind(("0.0.0.0", streams.local_addr().unwrap().port())).unwrap();
    streams.set_nonblocking(true).unwrap();
    datagrams.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let port = streams.local_addr().unwrap().port().to_string();
    let own = own_address().unwrap_or_else(|| "127.0.0.1".to_owned());
    let words = |service: &str| {
        let mut words = vec!["connect".to_owned()];
        words.extend(["127.0.0.1", &port, &own, &port, "127.0.0.1", service].map(str::to_owned));
        words.extend(ELSEWHERE.iter().map(|word| (*word).to_owned()));
        words
    };
    // Takes all that is there.
    let arrived = || {
        let (mut byte, mut any) = ([0; 8], false);
        while streams.accept().is_ok() || datagrams.recv(&mut byte).is_ok() {
            any = true;
        }
        any
    };
    Attack::new(
        "29: metadata service, broker, gateway, metrics, name server, private ranges, with `network: none`",
        "network namespace with loopback alone",
        |site: &Site| {
            let service = site.served().url.rsplit(':').next().unwrap_or_default().to_owned();
            let words = words(&service);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let said = site.hostile(&words, &json!({"user": "root"}));
            let mut through: Vec<_> =
                said.lines().filter(|line| line.contains(" OK ")).map(str::to_owned).collect();
            if arrived() {
                through.push("a packet arrived".to_owned());
            }
            Outcome::of(&through, "no packet arrived")
        },
    )
    .control(|| {
        let said = hostile_outside(&["connect", "127.0.0.1", &port])?;
        if said.contains(" OK OK") && arrived() { Ok("packets arrive".to_owned()) } else { Err(said) }
    })
    .bites_without(&[Defence::NetworkNamespace])
    .run();
}

#[test]
fn a30_ipc_of_the_host() {
    let key = (0x4855_0000 + (std::process::id() & 0xffff)).to_string();
    let Some(program) = programs::on_host(Program::Hostile) else { return };
    let mut holder = Command::new(program)
        .args(["ipc-hold", &key])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let words = ["ipc-find", key.as_str()];
    Attack::new("30: System V shared memory, semaphores and messages of the host", "IPC namespace", |site| {
        Outcome::of(&worked(&site.hostile(&words, &json!({"user": "root"}))), "none is there")
    })
    .control(|| {
        std::thread::sleep(Duration::from_millis(300));
        let said = hostile_outside(&words)?;
        if worked(&said).is_empty() { Err(said) } else { Ok("they are found".to_owned()) }
    })
    .bites_without(&[Defence::IpcNamespace])
    .run();
    holder.stdin.take().unwrap().write_all(b"x").unwrap();
    holder.wait().unwrap();
}

#[test]
fn a30_ipc_of_another_job() {
    let key = (0x4956_0000 + (std::process::id() & 0xffff)).to_string();
    Attack::new("30: IPC and /dev/shm of another job", "IPC namespace; a fresh /dev/shm", |site| {
        let hold = hostile(&["ipc-hold", &key, "3"], &json!({"user": "root"}));
        let find = hostile(&["ipc-find", &key, "1"], &json!({"user": "root"}));
        let results = site.jobs(&[hold, find]);
        let [found, held] = [0, 1].map(|number| text(&results[number]["stdout"]));
        assert_eq!(worked(&found).len(), 3, "{found}");
        let shm =
            [site.shell("root", "echo x > /dev/shm/canary; ls /dev/shm"), site.shell("root", "ls /dev/shm")];
        assert_eq!(shm, ["canary\n", ""]);
        Outcome::of(&worked(&held), "nothing crosses")
    })
    .control(|| Ok("a job finds its own".to_owned()))
    .bites_without(&[Defence::IpcNamespace])
    .run();
}

//! What a program finds about itself and around it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use hutch_tests::hutch::{PATIENCE, finish, result_of, start};
use serde_json::{Value, json};

use crate::{can_run, home, job, output, python, shell, shell_as};

#[test]
fn only_three_descriptors_are_open() {
    if !can_run("descriptors") {
        return;
    }
    const LIST: &str = "import os
for fd in sorted(map(int, os.listdir('/proc/self/fd'))):
    try: print(fd, os.readlink(f'/proc/self/fd/{fd}').split(':')[0])
    except OSError: print(fd, 'the listing')";
    assert_eq!(python(LIST), "0 /dev/null\n1 pipe\n2 pipe\n3 the listing\n");
    let given = output(&job(&["python3", "-c", LIST], &json!({"stdin": {"text": "x"}})));
    assert_eq!(given, "0 /memfd\n1 pipe\n2 pipe\n3 the listing\n");
}

#[test]
fn there_are_no_privileges() {
    if !can_run("privileges") {
        return;
    }
    for user in ["1001:1001", "root", "0:1001"] {
        let status = shell_as(user, "cat /proc/self/status");
        let fields: BTreeMap<_, _> = status.lines().filter_map(|line| line.split_once(":\t")).collect();
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(fields[set], "0000000000000000", "{set} as {user}");
        }
        assert_eq!((fields["NoNewPrivs"], fields["Seccomp"]), ("1", "2"), "as {user}");
    }
    assert_eq!(shell("id -G"), "1001\n", "groups");
    // SECBIT_*: what root gets from being root is locked away.
    assert_eq!(python("import ctypes\nprint(ctypes.CDLL(None).prctl(27))"), "239\n");
}

#[test]
fn only_own_processes_are_seen() {
    if !can_run("processes") {
        return;
    }
    let text = shell("echo $$; echo /proc/[0-9]*; cat /proc/1/comm; kill -0 1 2>&1; true");
    let mut lines = text.lines();
    let own = lines.next().unwrap();
    assert_ne!(own, "1", "the program is not pid 1");
    assert_eq!(lines.next(), Some(&*format!("/proc/1 /proc/{own}")));
    assert_eq!(lines.next(), Some("hutch-init"));
    for user in ["1001:1001", "root"] {
        let text = shell_as(
            user,
            "for file in environ mem maps auxv fd/0 fd/3 map_files; do cat /proc/1/$file 2> /dev/null && echo $file; done; \
             ls /proc/1/fd /proc/1/root/ /proc/1/cwd/ 2> /dev/null; readlink /proc/1/exe; tr -d '\\0' < /proc/1/cmdline; true",
        );
        assert_eq!(text.trim(), "hutch-init", "of the first process, as {user}");
    }
}

/// The namespaces of a process, by name.
fn namespaces(text: &str) -> BTreeMap<String, String> {
    text.split_whitespace()
        .filter_map(|link| link.split_once(':'))
        .map(|(name, inode)| (name.to_owned(), inode.to_owned()))
        .collect()
}

#[test]
fn every_namespace_is_the_job_s_own() {
    const NAMES: [&str; 7] = ["user", "mnt", "pid", "ipc", "uts", "net", "cgroup"];
    if !can_run("namespaces") {
        return;
    }
    let outside: Vec<_> = NAMES
        .iter()
        .map(|name| fs::read_link(format!("/proc/self/ns/{name}")).unwrap().to_string_lossy().into_owned())
        .collect();
    let outside = namespaces(&outside.join(" "));
    // At one time, since the number of a namespace that is gone may come again.
    let script =
        "for name in user mnt pid ipc uts net cgroup; do readlink /proc/self/ns/$name; done; sleep 2";
    let spec = job(&["sh", "-c", script], &Value::Null);
    let both = [start(home().command(), &spec), start(home().command(), &spec)]
        .map(|started| finish(started, PATIENCE))
        .map(|outcome| result_of(&outcome).unwrap())
        .map(|result| namespaces(&String::from_utf8_lossy(&result.stdout.data)));
    for name in NAMES {
        let all = [&outside[name], &both[0][name], &both[1][name]];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2], "{name}: {all:?}");
    }
}

#[test]
fn the_network_is_loopback() {
    if !can_run("the network") {
        return;
    }
    let text = shell(
        "sed 1,2d /proc/net/dev | cut -d: -f1 | tr -d ' '; wc -l < /proc/net/route; ls -A /sys | wc -l",
    );
    assert_eq!(text, "lo\n1\n0\n");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let text = python(&format!(
        "import socket, errno\n\
         def reach(address, family=socket.AF_INET):\n\
         \x20   s = socket.socket(family)\n\
         \x20   s.settimeout(5)\n\
         \x20   return errno.errorcode.get(s.connect_ex(address), 'OK')\n\
         server = socket.create_server(('127.0.0.1', 0))\n\
         print(reach(server.getsockname()))\n\
         print(reach(('127.0.0.1', {port})))\n\
         print(reach(('169.254.169.254', 80)), reach(('1.1.1.1', 53)), reach(('10.0.0.1', 80)))\n\
         print(reach('\\0hutch-test-{port}', socket.AF_UNIX))"
    ));
    // The host's listener on this port is another network's.
    assert_eq!(text, "OK\nECONNREFUSED\nENETUNREACH ENETUNREACH ENETUNREACH\nECONNREFUSED\n");
    drop(listener);
    if Path::new("/proc/net/if_inet6").exists() {
        let text = python(
            "import socket\ns = socket.create_server(('::1', 0), family=socket.AF_INET6)\nsocket.create_connection(s.getsockname()[:2])\nprint('OK')",
        );
        assert_eq!(text, "OK\n", "loopback of IPv6");
    }
}

#[test]
fn unix_sockets_of_the_host_are_out_of_reach() {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    if !can_run("abstract sockets") {
        return;
    }
    let name = format!("hutch-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    assert!(UnixStream::connect_addr(&address).is_ok(), "outside it is reached");
    let text = python(&format!(
        "import socket, errno\nprint(errno.errorcode.get(socket.socket(socket.AF_UNIX).connect_ex('\\0{name}'), 'OK'))"
    ));
    assert_eq!(text, "ECONNREFUSED\n");
}

#[test]
fn mounts_tell_nothing_of_the_host() {
    if !can_run("mounts") {
        return;
    }
    let text = shell("cat /proc/self/mountinfo");
    let own = home().path().to_string_lossy().into_owned();
    for word in [
        own.as_str(),
        env!("CARGO_MANIFEST_DIR"),
        "target",
        "/var/",
        "/home",
        "/root",
        "/dev/vd",
        "/dev/sd",
        "cgroup",
        "sysfs",
        "docker",
    ] {
        assert!(!text.contains(word), "`{word}` in:\n{text}");
    }
    for line in text.lines() {
        let (before, after) = line.split_once(" - ").unwrap();
        let kind = after.split(' ').next().unwrap();
        assert!(["overlay", "tmpfs", "proc", "devpts"].contains(&kind), "{line}");
        let options = before.split(' ').nth(5).unwrap();
        assert!(options.contains("nosuid"), "{line}");
        assert!(
            options.contains("nodev") || before.contains(" /dev") || before.contains(" /proc/"),
            "{line}"
        );
        assert!(!line.contains("shared:") && !line.contains("master:"), "{line}");
    }
    assert_eq!(shell("cut -d: -f3 /proc/self/cgroup | sort -u"), "/\n");
    assert_eq!(
        shell("ls -A /sys /run /srv /mnt; find / -xdev -name 'cgroup.procs' 2> /dev/null; true")
            .replace(['\n'], " "),
        "/mnt:  /run:  /srv:  /sys: "
    );
}

#[test]
fn the_host_s_name_is_not_shown() {
    if !can_run("the host's name") {
        return;
    }
    let before = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let text = shell("cat /proc/sys/kernel/hostname; uname -n; cat /proc/sys/kernel/domainname");
    let names: Vec<_> = text.lines().collect();
    assert!(names[0].starts_with("job-") && names[0] == names[1], "{names:?}");
    assert!(!text.contains(before.trim()), "{text}");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), before);
}

#[test]
fn proc_is_masked() {
    const EMPTY: [&str; 9] = [
        "kcore",
        "keys",
        "key-users",
        "kmsg",
        "timer_list",
        "sched_debug",
        "latency_stats",
        "kallsyms",
        "interrupts",
    ];
    const BARE: [&str; 3] = ["acpi", "asound", "scsi"];
    if !can_run("masks of /proc") {
        return;
    }
    for name in EMPTY.into_iter().filter(|name| Path::new("/proc").join(name).exists()) {
        assert_eq!(shell_as("root", &format!("head -c 100 /proc/{name} | wc -c")), "0\n", "{name}");
    }
    for name in BARE.into_iter().filter(|name| Path::new("/proc").join(name).exists()) {
        assert_eq!(shell_as("root", &format!("ls -A /proc/{name}")), "", "{name}");
    }
    // Whatever else is written to: the program's own files, and nothing besides.
    let text = shell_as(
        "root",
        "for file in $(find /proc -path '/proc/[0-9]*' -prune -o -path '/proc/self' -prune -o -path '/proc/thread-self' \
         -prune -o -type f -print 2> /dev/null); do (: >> $file) 2> /dev/null && [ ! -c $file ] && echo $file; done; true",
    );
    assert_eq!(text, "", "these can be written");
}

#[test]
fn the_devices_are_few_and_fixed() {
    if !can_run("devices") {
        return;
    }
    let text = shell_as(
        "root",
        "ls -A /dev /dev/pts /dev/shm; touch /dev/x; ls -A /dev | wc -l; (: > /dev/null) && (: < /dev/zero) && echo usable",
    );
    assert_eq!(
        text,
        "/dev:\nfd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n\n\
         /dev/pts:\nptmx\n\n/dev/shm:\n13\nusable\n"
    );
    let text = python(
        "import os, pty\nfor n in ('null', 'zero', 'full', 'random', 'urandom', 'tty'):\n\
         \x20   r = os.stat('/dev/' + n).st_rdev\n\
         \x20   print(n, os.major(r), os.minor(r), end=' ')\n\
         a, b = pty.openpty()\nos.write(a, b'x\\n')\nprint(os.read(b, 10), os.ttyname(b))",
    );
    assert_eq!(text, "null 1 3 zero 1 5 full 1 7 random 1 8 urandom 1 9 tty 5 0 b'x\\n' /dev/pts/0\n");
}

//! Attacks by what a layer holds.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use hutch_sandbox::Defence;
use hutch_tests::programs::{self, Program};
use serde_json::{Value, json};

use crate::attack::{Attack, Outcome};
use crate::site::{Site, job, text};

/// A directory that is stacked on top of the host's programs; others may enter it.
fn layer(site: &Site, name: &str) -> PathBuf {
    let dir = site.place(name);
    for dir in dir.ancestors().take(3) {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

fn on(layer: &Path, more: Value) -> Value {
    let mut more = more;
    let mut layers = vec![json!("host")];
    layers.extend(programs::layer().map(|dir| json!(format!("dir:{}", dir.display()))));
    layers.push(json!(format!("dir:{}", layer.display())));
    more["layers"] = json!(layers);
    more
}

#[test]
fn a01_the_worker_s_own_program() {
    Attack::new(
        "1: overwrite the worker's program through /proc/self/exe (CVE-2019-5736)",
        "its owner is no user of the sandbox; init is not dumpable",
        |site| {
            let env = json!({"LD_PRELOAD": programs::inside(Program::Preloaded)});
            let mut through = Vec::new();
            for user in ["root", "1001:1001"] {
                let said =
                    text(&site.job(&job(&["/proc/self/exe"], &json!({"user": user, "env": env})))["stdout"]);
                through.extend(
                    said.lines().filter(|line| line.ends_with(" OK")).map(|line| format!("{line} as {user}")),
                );
                let words = ["open-for-writing", "/proc/1/exe", "/proc/1/mem", "/proc/1/map_files"];
                let said = site.hostile(&words, &json!({"user": user}));
                through.extend(said.lines().filter(|line| line.ends_with(" OK")).map(str::to_owned));
            }
            Outcome::of(&through, "it is not changed")
        },
    )
    .control(|| {
        let library = programs::on_host(Program::Preloaded).ok_or("there is no C compiler")?;
        let copy = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
        fs::copy(hutch_tests::hutch::binary(), copy.path()).map_err(|e| e.to_string())?;
        fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
        let path = copy.into_temp_path();
        let output = Command::new(&path).env("LD_PRELOAD", library).output().map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if said.contains("chmod OK") {
            Ok("its owner can change it".to_owned())
        } else {
            Err(format!("root cannot change a program that it runs: {said}"))
        }
    })
    .bites_without(&[Defence::UserNamespace])
    .run();
}

#[test]
fn a04_dev_null_that_is_a_link() {
    Attack::new(
        "4: a layer whose /dev/null is a link to core_pattern (CVE-2025-31133)",
        "a device tree of its own on /dev",
        |site| {
            let layer = layer(site, "null");
            fs::create_dir_all(layer.join("dev/shm")).unwrap();
            fs::create_dir_all(layer.join("dev/pts")).unwrap();
            let _ = symlink("/proc/sys/kernel/core_pattern", layer.join("dev/null"));
            let spec =
                on(&layer, job(&["readlink", "/proc/self/fd/0", "/dev/null"], &json!({"user": "root"})));
            let said = text(&site.job(&spec)["stdout"]);
            Outcome::held_if(said == "/dev/null\n", said)
        },
    )
    .control(|| Ok("the link is followed where nothing covers it".to_owned()))
    .has_no_switch("without it no job starts as this test needs one; to be shown by another way")
    .run();
}

#[test]
fn a05_terminals_that_are_links() {
    Attack::new(
        "5: a layer whose /dev/pts/0, /dev/console or /dev/ptmx is a link (CVE-2025-52565)",
        "a device tree and a devpts of its own on /dev",
        |site| {
            let layer = layer(site, "pts");
            fs::create_dir_all(layer.join("dev/shm")).unwrap();
            fs::create_dir_all(layer.join("dev/pts")).unwrap();
            fs::write(layer.join("dev/null"), "").unwrap();
            for name in ["dev/pts/0", "dev/console", "dev/ptmx"] {
                let _ = symlink("/proc/sys/kernel/core_pattern", layer.join(name));
            }
            let command = ["readlink", "/dev/pts/0", "/dev/console", "/dev/ptmx"];
            let said = text(&site.job(&on(&layer, job(&command, &json!({"user": "root"}))))["stdout"]);
            Outcome::held_if(said == "pts/ptmx\n", said)
        },
    )
    .control(|| Ok("the links are followed where nothing covers them".to_owned()))
    .has_no_switch("without it no job starts as this test needs one; to be shown by another way")
    .run();
}

/// Directories of a layer that are links: nothing may be made where they lead.
fn links_for_directories(site: &Site) -> Outcome {
    let mut through = Vec::new();
    // Those that are ours may not be links at all: the job does not start.
    for name in ["dev", "proc"] {
        let layer = layer(site, &format!("link-{name}"));
        let _ = symlink("/tmp", layer.join(name));
        let result = site.job(&on(&layer, job(&["true"], &json!({"user": "root"}))));
        if result["status"] == "succeeded" {
            through.push(format!("/{name} was a link"));
        }
    }
    // All others lead to where they lead inside.
    let layer = layer(site, "link-data");
    let _ = symlink("/", layer.join("data"));
    let _ = symlink("../../../../../../../..", layer.join("up"));
    let _ = symlink("/up/made", layer.join("far"));
    let more = json!({
        "user": "root",
        "volumes": [{"volume": "kept", "target": "/data/hutch-canary"}],
        "files": [{"path": "/up/hutch-file", "text": "x"}],
    });
    let spec = on(
        &layer,
        job(
            &["sh", "-c", "ls -d /hutch-canary /hutch-file && grep -c hutch-canary /proc/self/mounts"],
            &more,
        ),
    );
    let result = site.job(&spec);
    if text(&result["stdout"]) != "/hutch-canary\n/hutch-file\n1\n" {
        through.push(format!("made elsewhere: {}; {}", text(&result["stdout"]), result["message"]));
    }
    Outcome::of(&through, "nothing is made outside the root")
}

#[test]
fn a06_directories_that_are_links() {
    Attack::new(
        "6: a layer whose /dev, /proc or another directory is a link",
        "openat2 within the root's descriptor",
        |site| {
            let before = site.roots();
            let outcome = links_for_directories(site);
            assert!(
                !Path::new("/hutch-canary").exists() && !Path::new("/hutch-file").exists(),
                "made on the host"
            );
            if matches!(outcome, Outcome::Held(_)) {
                assert_eq!(site.roots(), before, "files in the launcher's root");
            }
            outcome
        },
    )
    .control(|| Ok("links are followed by those who do not take care".to_owned()))
    .bites_without(&[Defence::ScopedPaths])
    .run();
}

#[test]
fn a07_a_procfs_that_is_none() {
    Attack::new(
        "7: a layer with a /proc of plain files (CVE-2019-19921, CVE-2025-52881)",
        "a proc of its own on /proc, made before a layer is looked at",
        |site| {
            let layer = layer(site, "proc");
            fs::create_dir_all(layer.join("proc/self/attr")).unwrap();
            fs::write(layer.join("proc/self/attr/exec"), "").unwrap();
            fs::write(layer.join("proc/fake"), "fake").unwrap();
            let command =
                ["sh", "-c", "cat /proc/fake 2> /dev/null; grep -c ' /proc proc ' /proc/mounts 2> /dev/null"];
            let said = text(&site.job(&on(&layer, job(&command, &json!({"user": "root"}))))["stdout"]);
            Outcome::held_if(said == "1\n", said)
        },
    )
    .control(|| Ok("the files are seen where nothing covers them".to_owned()))
    .bites_without(&[Defence::OwnProc])
    .run();
}

fn checksum(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// Every way that a job has to write to a file of a layer.
const WRITE_TO_LAYER: &str = r"
import os, mmap, ctypes
path = '/shared/file'
def attempt(work):
    try: work()
    except Exception: pass
def inplace():
    with open(path, 'r+b') as file: file.write(b'EVIL')
def mapped():
    fd = os.open(path, os.O_RDONLY)
    memory = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    memory[:4] = b'EVIL'
def through_mem():
    fd = os.open(path, os.O_RDONLY)
    memory = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, 4096, 1, 1, fd, 0)
    with open('/proc/self/mem', 'r+b', buffering=0) as file:
        file.seek(address); file.write(b'EVIL')
def spliced():
    # CVE-2022-0847: a pipe whose pages may be merged into.
    fd = os.open(path, os.O_RDONLY)
    r, w = os.pipe()
    os.write(w, b'x' * 65536); os.read(r, 65536)
    os.splice(fd, w, 1, offset_src=0)
    os.write(w, b'EVIL')
for work in (mapped, through_mem, spliced, inplace): attempt(work)
print(open(path, 'rb').read(4).decode())
";

#[test]
fn a19_bytes_of_a_shared_layer() {
    Attack::new(
        "19: change a layer's bytes for the next job, by a fault of the page cache (CVE-2022-0847) or plainly",
        "a layer is a lower directory; kernels from 6.1 on",
        |site| {
            let layer = layer(site, "shared-layer");
            fs::create_dir_all(layer.join("shared")).unwrap();
            let file = layer.join("shared/file");
            fs::write(&file, vec![b'g'; 8192]).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
            let before = checksum(&file);
            let first = text(&site.job(&on(&layer, job(&["python3", "-c", WRITE_TO_LAYER], &json!({"user": "root"}))))["stdout"]);
            assert_eq!(first, "EVIL\n", "the job sees what it wrote");
            let next = text(&site.job(&on(&layer, job(&["head", "-c", "4", "/shared/file"], &json!({}))))["stdout"]);
            Outcome::held_if(next == "gggg" && checksum(&file) == before, format!("the next job reads {next}"))
        },
    )
    .control(|| Ok("the job itself sees what it wrote".to_owned()))
    .has_no_switch("overlayfs has no way to write to a lower directory, and a fault of the kernel is not to be had")
    .run();
}

/// A program that says who runs it, with set-user-ID bits of the sandbox's root.
#[test]
fn a20_set_user_id_programs() {
    Attack::new("20: a set-user-ID program in a layer", "no_new_privs, and nosuid mounts", |site| {
        let layer = layer(site, "setuid");
        let id = layer.join("id");
        fs::copy("/usr/bin/id", &id).unwrap();
        fs::set_permissions(&id, fs::Permissions::from_mode(0o6755)).unwrap();
        let said =
            text(&site.job(&on(&layer, job(&["sh", "-c", "stat -c %a /id; /id -u"], &json!({}))))["stdout"]);
        Outcome::held_if(said == "6755\n1001\n", said)
    })
    .control(|| {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let id = dir.path().join("id");
        fs::copy("/usr/bin/id", &id).map_err(|e| e.to_string())?;
        for (path, mode) in [(dir.path(), 0o755), (&id, 0o6755)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| e.to_string())?;
        }
        let output = Command::new(&id).arg("-u").uid(1001).gid(1001).output().map_err(|e| e.to_string())?;
        if output.stdout == b"0\n" {
            Ok("it runs as its owner".to_owned())
        } else {
            Err("it gives nothing outside either".to_owned())
        }
    })
    .bites_without(&[Defence::NoNewPrivileges, Defence::NoSuid, Defence::Seccomp])
    .run();
}

#[test]
fn a21_device_nodes_of_a_layer() {
    let made = |dir: &Path| {
        let node = dir.join("node");
        let status = Command::new("mknod").args(["-m", "666"]).arg(&node).args(["c", "1", "5"]).status();
        (status.is_ok_and(|status| status.success()) && fs::File::open(&node).is_ok()).then_some(node)
    };
    Attack::new("21: a device node in a layer", "nodev mounts", |site| {
        let layer = layer(site, "device");
        let _ = fs::remove_file(layer.join("node"));
        assert!(made(&layer).is_some());
        let script = "test -c /node && head -c 1 /node | wc -c";
        let said =
            text(&site.job(&on(&layer, job(&["sh", "-c", script], &json!({"user": "root"}))))["stdout"]);
        Outcome::held_if(said == "0\n", said)
    })
    .control(|| {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        made(dir.path())
            .map(|_| "it is opened".to_owned())
            .ok_or_else(|| "it cannot be opened outside either".to_owned())
    })
    .bites_without(&[Defence::NoDev])
    .run();
}

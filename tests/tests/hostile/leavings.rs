//! What a job leaves and says: outputs, logs, names.

use hutch_sandbox::Defence;
use serde_json::{Value, json};

use crate::attack::{Attack, Outcome};
use crate::site::{job, text};

fn leaving(script: &str, globs: &[&str]) -> Value {
    job(&["python3", "-c", script], &json!({"user": "root", "cwd": "/box", "outputs": {"paths": globs}}))
}

#[test]
fn a41_sparse_files() {
    Attack::new("41: a sparse file of an exbibyte as an output", "a cap on what is read", |site| {
        let result = site.job(&leaving("open('/box/huge','wb').truncate(1<<60)", &["/box/**"]));
        let outputs = &result["outputs"];
        Outcome::held_if(
            outputs["truncated"] == true && outputs["archive"].is_null(),
            format!("listed, not read: {}", outputs["files"]),
        )
    })
    .has_no_switch("there is no reading of an exbibyte to be shown")
    .run();
}

#[test]
fn a42_floods_of_output() {
    Attack::new("42: a flood of output without a newline", "what is kept is bounded", |site| {
        let flood = job(
            &["sh", "-c", "head -c 300000000 /dev/zero; head -c 300000000 /dev/zero >&2"],
            &json!({"limits": {"wall_time_ms": 60000}}),
        );
        // The first ones make the allocator's room for what is kept, in each of its arenas.
        for _ in 0..4 {
            let _ = site.job(&flood);
        }
        let before = site.served().process().resident_kb();
        let result = site.job(&flood);
        let grown = site.served().process().resident_kb().saturating_sub(before);
        let stdout = &result["stdout"];
        Outcome::held_if(
            stdout["truncated"] == true && stdout["bytes"] == 300_000_000 && grown < 16 << 10,
            format!("{} bytes, the worker grew by {grown} kB", stdout["bytes"]),
        )
    })
    .has_no_switch("a bound on memory is where the bytes are put")
    .run();
}

#[test]
fn a43_texts_that_are_obeyed() {
    Attack::new(
        "43: escape sequences, NUL, text of metrics in labels and output",
        "encoded wherever they are shown",
        |site| {
            let two_lines = json!({"labels": {"tenant": "a\"} 1\nhutch_evil 1\n"}});
            let refused = site.job(&job(&["true"], &two_lines));
            let label = "a\"} 1 # {b=\"c";
            let shown = json!({"labels": {"tenant": label}});
            let result = site.job(&job(&["printf", "\\033[2J\\000\\377"], &shown));
            let metrics = site.served().get("/metrics");
            let injected = metrics.lines().any(|line| line.starts_with("hutch_evil"));
            let raw = serde_json::to_string(&result).unwrap_or_default();
            let encoded = result["labels"]["tenant"] == label && result["stdout"]["base64"] == "G1sySgD/";
            Outcome::held_if(
                !injected && encoded && !raw.contains('\u{1b}') && refused["result"].is_null(),
                format!("{result}; a label of two lines: {refused}"),
            )
        },
    )
    .with("HUTCH__WORKER__METRIC_LABELS", "tenant")
    .has_no_switch("encoding is what writes them")
    .run();
}

#[test]
fn a44_daemons_that_hold_the_output_open() {
    Attack::new(
        "44: a daemon keeps stdout open after the program has ended",
        "the program's end is the job's",
        |site| {
            let result = site.job(&job(&["sh", "-c", "(setsid sleep 1000 &); echo done"], &json!({})));
            let ran = result["timeline"]["run_us"].as_u64().unwrap_or(u64::MAX);
            Outcome::held_if(text(&result["stdout"]) == "done\n" && ran < 10_000_000, format!("{ran} us"))
        },
    )
    .has_no_switch("whoever waited for the output would wait for ever")
    .run();
}

#[test]
fn a45_trees_without_end() {
    Attack::new("45: 10,000 directories deep, 60,000 entries, names of 255 bytes", "walked by descriptors, one at a time", |site| {
        let deep = "import os\nfor i in range(10000):\n  os.mkdir('d'); os.chdir('d')\n";
        let wide = "import os\nfor i in range(60000): os.close(os.open('/box/'+('n'*240)+str(i), os.O_CREAT|os.O_WRONLY))";
        let mut seen = Vec::new();
        for script in [deep, wide] {
            let result = site.job(&leaving(script, &["/box/**"]));
            let listed = result["outputs"]["files"].as_array().map_or(0, Vec::len);
            seen.push(format!("{listed} listed"));
            if result["status"] != "succeeded" || result["outputs"]["truncated"] != true || listed > 10_000 {
                return Outcome::Through(format!("{} {listed}", result["message"]));
            }
        }
        Outcome::Held(seen.join(", "))
    })
    .has_no_switch("caps are how the list is made")
    .run();
}

#[test]
fn a46_outputs_that_are_no_files() {
    Attack::new("46: links, FIFOs and sockets as outputs", "listed as what they are, never followed or opened", |site| {
        let script = "import os,socket\nos.symlink('/etc/passwd','/box/link')\nos.symlink('/proc/1/root/etc/passwd','/box/proc')\n\
                      os.mkfifo('/box/fifo')\nsocket.socket(socket.AF_UNIX).bind('/box/socket')\nos.symlink('/','/box/all')";
        let result = site.job(&leaving(script, &["/box/**"]));
        let mut kinds: Vec<_> = result["outputs"]["files"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|file| Some(format!("{} {}", file["path"].as_str()?, file["kind"].as_str()?)))
            .collect();
        kinds.sort();
        let wanted = ["/box/all symlink", "/box/fifo special", "/box/link symlink", "/box/proc symlink", "/box/socket special"];
        Outcome::held_if(kinds == wanted, format!("{kinds:?}"))
    })
    .has_no_switch("what is not opened cannot be read")
    .run();
}

#[test]
fn a47_paths_that_change_while_they_are_read() {
    let rounds = if std::env::var_os("HUTCH_LONG_TESTS").is_some() { 10_000 } else { 25 };
    Attack::new(
        "47: swap a path while it is collected",
        "nothing is read before the tree is dead",
        move |site| {
            let script = "(while :; do ln -sfn /etc/passwd f; rm -f f; echo own > f; done) & sleep 0.05";
            for round in 0..rounds {
                let spec = json!({"user": "root", "cwd": "/box", "outputs": {"paths": ["/box/f"]}});
                let result = site.job(&job(&["sh", "-c", script], &spec));
                let file = &result["outputs"]["files"][0];
                let size = file["bytes"].as_u64().unwrap_or(0);
                if file["kind"] == "file" && size > 4 {
                    return Outcome::Through(format!("round {round}: {file}"));
                }
            }
            Outcome::Held(format!("{rounds} rounds, nothing but its own"))
        },
    )
    .has_no_switch("a walk beside a living tree is not there to be switched on")
    .run();
}

#[test]
fn a48_forged_whiteouts() {
    let attack = Attack::new("48: forge whiteouts and attributes of overlayfs", "mknod and trusted.* are refused", |site| {
        let script = "import os\nfor what in ('trusted.overlay.opaque','trusted.overlay.redirect'):\n  try:\n    os.setxattr('/usr',what,b'/etc'); print('set',what)\n  except OSError: pass\n\
                      try:\n  os.mknod('/usr/bin/forged', 0o20000, 0); print('whiteout')\nexcept OSError: pass";
        let seen = site.stdout(&job(&["python3", "-c", script], &json!({"user": "root"})));
        Outcome::held_if(seen.is_empty(), seen)
    })
    .control(|| {
        let place = tempfile::tempdir().map_err(|e| e.to_string())?;
        let set = std::process::Command::new("python3")
            .args(["-c", "import os,sys; os.setxattr(sys.argv[1],'trusted.overlay.opaque',b'y')"])
            .arg(place.path())
            .status();
        if set.is_ok_and(|status| status.success()) {
            Ok("root of the host may set them".to_owned())
        } else {
            Err("trusted attributes cannot be set on this file system".to_owned())
        }
    });
    // An overlay lets its own attributes be set, escaped, since Linux 6.7.
    let attack = if hutch_tests::kernel() >= (6, 7) {
        attack.bites_without(&[Defence::UserNamespace, Defence::Capabilities, Defence::Seccomp])
    } else {
        attack.has_no_switch("before Linux 6.7 an overlay refuses it to everybody")
    };
    attack.run();
}

//! What a job leaves, stacked again: here, by another worker, in a chain; and random stacks beside umoci's.

use std::fs;
use std::process::Command;

use hutch_tests::house::House;
use serde_json::json;

use crate::tars::Layer;
use crate::{busybox, house_with_busybox, output, run};

const BASE: &str = "image:test/busybox:1";

/// A job that changes something of everything, and leaves it as a layer.
fn changing(id: &str, layers: &[&str]) -> serde_json::Value {
    let script = "echo new > /new; mkdir -p /d/e; echo x > /d/e/f; ln /new /hard; ln -s new /soft; rm /bin/stat; \
                  touch -d @1000000 /old; rm -rf /tmp; mkdir /tmp; echo again > /tmp/again";
    json!({"id": id, "layers": layers, "user": "0:0", "cwd": "/", "command": ["/bin/sh", "-c", script],
        "outputs": {"layer": true}})
}

const FIRST: &str = "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a01";
const SECOND: &str = "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a02";

#[test]
fn what_a_job_left_is_a_layer_of_the_next() {
    let Some(house) = house_with_busybox() else { return };
    let layer = run(&house, &changing(FIRST, &[BASE]))["outputs"]["layer"].clone();
    let layer = layer.as_str().expect("a digest").to_owned();
    std::thread::sleep(std::time::Duration::from_millis(1_100));
    let again = run(&house, &changing(SECOND, &[BASE]))["outputs"]["layer"].clone();
    assert_eq!(again, layer.as_str(), "the same changes are the same layer, whenever they are made");
    for reference in [layer.as_str(), &format!("job:{FIRST}")] {
        let seen = output(
            &house,
            &[BASE, reference],
            "cat /new /hard /soft /d/e/f; ls /bin/stat 2>&1; ls -A /tmp; [ /new -ef /hard ] && echo linked; \
             [ /old -ot /bin/busybox ] && [ /new -nt /bin/busybox ] && echo times",
        );
        let wanted = "new\nnew\nnew\nx\nls: /bin/stat: No such file or directory\nagain\nlinked\ntimes\n";
        assert_eq!(seen, wanted, "{reference}");
    }
    let refused =
        run(&house, &json!({"layers": ["job:0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2aff"], "command": ["x"]}));
    assert_eq!(
        (&refused["status"], &refused["reason"]),
        (&json!("rejected"), &json!("image_error")),
        "{refused}"
    );
}

#[test]
fn another_worker_with_an_empty_store_stacks_it_too() {
    let Some(house) = house_with_busybox() else { return };
    let store = format!("file://{}", house.path("shared").display());
    let variables = [("HUTCH__STORE__URL", store.as_str())];
    let mut import = house.command(&["layer", "import", "busybox.tar", "--name", "test/busybox:1"]);
    assert!(import.envs(variables).status().expect("import").success());
    let one = house.serve_with(&["up", "--data", "one"], &variables);
    let done = one.post("/v1/jobs?wait_ms=30000", &changing(FIRST, &[BASE]));
    assert_eq!(done["status"], "succeeded", "{done}");
    drop(one);
    let two = house.serve_with(&["up", "--data", "two"], &variables);
    let job = json!({"layers": [BASE, format!("job:{FIRST}")], "command": ["cat", "/d/e/f"]});
    let done = two.post("/v1/jobs?wait_ms=30000", &job);
    assert_eq!((&done["status"], &done["stdout"]["text"]), (&json!("succeeded"), &json!("x\n")), "{done}");
    let metrics = two.get("/metrics");
    assert!(metrics.contains("hutch_layer_cache_misses_total 2"), "{metrics}");
    let _ = two.post("/v1/jobs?wait_ms=30000", &job);
    assert!(two.get("/metrics").contains("hutch_layer_cache_hits_total 2"));
}

#[test]
fn a_chain_of_twenty_layers_holds() {
    let Some(house) = house_with_busybox() else { return };
    let id = |n: usize| format!("0199d0c4-7f3a-7c1e-9a55-0d8f6c1b{n:04}");
    let mut layers = vec![BASE.to_owned()];
    for n in 0..20 {
        let script = format!("echo {n} > /made/{n} && rm -f /made/{}", n.max(5) - 5);
        let job = json!({"id": id(n), "layers": layers, "user": "0:0", "cwd": "/made",
            "command": ["/bin/sh", "-c", script], "outputs": {"layer": true}});
        assert_eq!(run(&house, &job)["status"], "succeeded");
        layers.push(format!("job:{}", id(n)));
    }
    let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
    assert_eq!(
        output(&house, &layers, "cat $(ls /made | sort -n | while read n; do echo /made/$n; done)"),
        "15\n16\n17\n18\n19\n"
    );
}

#[test]
fn a_layer_of_the_hosts_programs_stacks_on_them() {
    let Some(house) = House::with_sandboxes() else { return };
    let job = json!({"id": FIRST, "layers": ["host"], "user": "0:0", "cwd": "/",
        "command": ["sh", "-c", "echo '#!/bin/sh\necho mine' > /usr/local/bin/mine; chmod 755 /usr/local/bin/mine; rm /usr/bin/env"],
        "outputs": {"layer": true}});
    assert_eq!(run(&house, &job)["status"], "succeeded");
    let layer = format!("job:{FIRST}");
    let seen = run(
        &house,
        &json!({"layers": ["host", layer], "command": ["sh", "-c", "mine; ls /usr/bin/env; true"]}),
    );
    assert_eq!(seen["stdout"]["text"], "mine\n", "{seen}");
    assert!(seen["stderr"]["text"].as_str().expect("text").contains("/usr/bin/env"), "{seen}");
}

/// Numbers that look random, the same for the same seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// A layer of random changes below `t`: what comes after stands for what was there before.
fn random_layer(numbers: &mut Numbers) -> Vec<u8> {
    let mut tar = Layer::new();
    tar.dir("t", 0o755);
    fill(&mut tar, "t", numbers, 0);
    tar.bytes()
}

fn fill(tar: &mut Layer, dir: &str, numbers: &mut Numbers, depth: u32) {
    let mut first_file = None;
    for name in ["a", "b", "c", "d"] {
        let path = format!("{dir}/{name}");
        let mode = [0o755, 0o700, 0o711][usize::try_from(numbers.below(3)).expect("small")];
        match numbers.below(9) {
            0 | 1 => {
                tar.file(&path, format!("{path} {}", numbers.below(1_000)).as_bytes(), mode & 0o666);
                first_file = Some(path);
            }
            2 => tar.link(
                &path,
                ["b", "../c", "/t/d/a", "missing"][usize::try_from(numbers.below(4)).expect("small")],
            ),
            3 => tar.file(&format!("{dir}/.wh.{name}"), b"", 0o644),
            4 => match &first_file {
                Some(target) => tar.hard_link(&path, target),
                None => tar.file(&path, b"alone", 0o600),
            },
            5 | 6 if depth < 3 => {
                tar.dir(&path, mode);
                if numbers.below(4) == 0 {
                    tar.file(&format!("{path}/.wh..wh..opq"), b"", 0o644);
                }
                fill(tar, &path, numbers, depth + 1);
            }
            _ => {}
        }
    }
}

/// Every path below `/t`, what it is, and what is in it.
const LISTING: &str = "cd /t && find . | sort | while read -r p; do \
    if [ -L \"$p\" ]; then stat -c '%N %u:%g' \"$p\"; \
    elif [ -d \"$p\" ]; then stat -c '%n %F %a %u:%g' \"$p\"; \
    else stat -c '%n %F %a %u:%g %s %Y' \"$p\"; md5sum < \"$p\"; fi; done";

/// The same stack by umoci: the tree that an OCI runtime would see.
fn by_umoci(house: &House, stack: &[Vec<u8>], number: usize) -> (String, String) {
    let layout = house.path(&format!("layout-{number}"));
    let image = format!("{}:latest", layout.display());
    let umoci = |arguments: &[&str]| {
        let done = Command::new("umoci").args(arguments).output().expect("umoci");
        assert!(done.status.success(), "umoci {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    umoci(&["init", "--layout", layout.to_str().expect("utf-8")]);
    umoci(&["new", "--image", &image]);
    for (index, layer) in stack.iter().enumerate() {
        let file = house.path(&format!("layer-{number}-{index}.tar"));
        fs::write(&file, layer).expect("write");
        umoci(&["raw", "add-layer", "--image", &image, file.to_str().expect("utf-8")]);
    }
    let bundle = house.path(&format!("bundle-{number}"));
    umoci(&["unpack", "--image", &image, bundle.to_str().expect("utf-8")]);
    let rootfs = bundle.join("rootfs");
    let listed =
        Command::new("chroot").arg(&rootfs).args(["/bin/sh", "-c", LISTING]).output().expect("chroot");
    fs::remove_dir_all(&bundle).expect("remove");
    (String::from_utf8_lossy(&listed.stdout).into_owned(), layout.to_str().expect("utf-8").to_owned())
}

#[test]
fn a_stack_is_what_umoci_makes_of_it() {
    let Some(house) = House::with_sandboxes() else { return };
    let rounds = if std::env::var_os("HUTCH_LONG_TESTS").is_some() { 300 } else { 12 };
    for number in 0..rounds {
        let mut numbers = Numbers(number as u64 + 1);
        let layers = 2 + numbers.below(4);
        let mut stack = vec![busybox()];
        stack.extend((0..layers).map(|_| random_layer(&mut numbers)));
        let (wanted, layout) = by_umoci(&house, &stack, number);
        assert!(wanted.lines().count() > 1, "stack {number}: {wanted}");
        let name = format!("test/stack:{number}");
        let done = house.hutch(&["layer", "import", &layout, "--name", &name]);
        assert_eq!(done.code, 0, "{done:?}");
        let seen = output(&house, &[&format!("image:{name}")], LISTING);
        assert_eq!(seen, wanted, "stack {number}");
    }
}

//! Images: in by file and by registry, with what they say of themselves.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hutch_tests::house::House;
use serde_json::json;

use crate::{busybox, house_with_busybox, run};

fn succeeds(command: &mut Command) {
    let done = command.output().expect("start");
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// An OCI layout of busybox with a config that says something of everything, made by umoci.
fn layout(house: &House) -> String {
    let layout = house.path("layout");
    let layout = layout.to_str().expect("utf-8");
    let image = format!("{layout}:latest");
    std::fs::write(house.path("base.tar"), busybox()).expect("write");
    succeeds(Command::new("umoci").args(["init", "--layout", layout]));
    succeeds(Command::new("umoci").args(["new", "--image", &image]));
    succeeds(Command::new("umoci").args(["raw", "add-layer", "--image", &image]).arg(house.path("base.tar")));
    succeeds(Command::new("umoci").args([
        "config",
        "--image",
        &image,
        "--config.entrypoint",
        "/bin/sh",
        "--config.entrypoint",
        "-c",
        "--config.cmd",
        "echo $FROM_IMAGE $OVER; cat /proc/self/cwd/here 2>&1; id -u",
        "--config.env",
        "FROM_IMAGE=image",
        "--config.env",
        "OVER=image",
        "--config.env",
        "PATH=/bin",
        "--config.workingdir",
        "/srv/work",
        "--config.user",
        "0:0",
    ]));
    layout.to_owned()
}

#[test]
fn a_job_takes_what_it_leaves_out_from_its_image() {
    let Some(house) = House::with_sandboxes() else { return };
    let layout = layout(&house);
    let done = house.hutch(&["layer", "import", &layout]);
    assert!(done.code == 1 && done.stderr.contains("--name"), "a tag alone names nothing: {done:?}");
    assert_eq!(house.hutch(&["layer", "import", &layout, "--name", "test/config:1"]).code, 0);
    let job = json!({"layers": ["image:test/config:1"], "env": {"OVER": "job"},
        "files": [{"path": "/srv/work/here", "text": "in the image's directory\n"}]});
    let result = run(&house, &job);
    assert_eq!(result["stdout"]["text"], "image job\nin the image's directory\n1001\n", "{result}");
    let own =
        run(&house, &json!({"layers": ["image:test/config:1"], "cwd": "/", "command": ["echo", "own"]}));
    assert_eq!(own["stdout"]["text"], "own\n", "{own}");
}

#[test]
fn archives_of_other_tools_are_imported() {
    let Some(house) = House::with_sandboxes() else { return };
    let from = format!("oci:{}:latest", layout(&house));
    for (kind, file) in [("docker-archive", "docker.tar"), ("oci-archive", "oci.tar")] {
        let to = format!("{kind}:{}:test/{kind}:1", house.path(file).display());
        succeeds(Command::new("skopeo").args(["--insecure-policy", "copy", &from, &to]));
        let name = format!("docker.io/test/{kind}:1");
        let mut arguments = vec!["layer", "import", file];
        if kind == "oci-archive" {
            // skopeo gives an OCI archive nothing but what comes after the path: a name.
            arguments.extend(["--name", &name]);
        }
        let done = house.hutch(&arguments);
        assert_eq!((done.code, done.stdout.as_str()), (0, format!("image:{name}\n").as_str()), "{done:?}");
        let result = run(&house, &json!({"layers": [format!("image:{name}")], "command": ["echo", kind]}));
        assert_eq!(result["stdout"]["text"], format!("{kind}\n"), "{result}");
    }
    let listed = house.hutch(&["layer", "list", "--json"]).json();
    assert_eq!(listed["images"].as_array().expect("images").len(), 2, "{listed}");
    assert_eq!(
        listed["layers"].as_array().expect("layers").len(),
        1,
        "one layer, whatever brought it: {listed}"
    );
}

/// A registry of this test's own.
struct Registry(Child, u16);

impl Registry {
    fn start(house: &House) -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").expect("port").local_addr().expect("address").port();
        let config = house.file(
            "registry.yml",
            &format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
                 http: {{addr: '127.0.0.1:{port}'}}\n",
                house.path("registry").display()
            ),
        );
        let mut command = Command::new("docker-registry");
        command.args(["serve", &config]).stdout(Stdio::null()).stderr(Stdio::null());
        let registry = Self(command.spawn().ok()?, port);
        let begun = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the registry does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_comes_from_its_registry_once_for_many_jobs() {
    let Some(house) = House::with_sandboxes() else { return };
    let from = format!("oci:{}:latest", layout(&house));
    let Some(registry) = Registry::start(&house) else {
        return hutch_tests::skip("images from a registry", "docker-registry is not installed");
    };
    let name = format!("localhost:{}/test/pulled:1", registry.1);
    let to = format!("docker://{name}");
    succeeds(Command::new("skopeo").args([
        "--insecure-policy",
        "copy",
        "--dest-tls-verify=false",
        &from,
        &to,
    ]));
    let served = house.serve(&["up", "--slots", "4"]);
    let jobs: Vec<_> = (0..10)
        .map(|n| json!({"layers": [format!("image:{name}")], "command": ["echo", n.to_string()]}))
        .collect();
    let answer = served.post("/v1/jobs/batch", &json!(jobs));
    let ids: Vec<_> = served_ids(&answer);
    assert_eq!(ids.len(), 10, "{answer}");
    for (n, id) in ids.iter().enumerate() {
        let begun = Instant::now();
        let result = loop {
            let job = served.get_json(&format!("/v1/jobs/{id}"));
            if job["state"] == "finished" {
                break job["result"].clone();
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{job}");
            std::thread::sleep(Duration::from_millis(50));
        };
        assert_eq!(result["stdout"]["text"], format!("{n}\n"), "{result}");
    }
    assert!(
        served.get("/metrics").contains("hutch_layer_cache_misses_total 0"),
        "a pull unpacks what it brings"
    );
    let missing = format!("image:localhost:{}/test/missing:1", registry.1);
    let result = served.post("/v1/jobs?wait_ms=30000", &json!({"layers": [missing], "command": ["true"]}));
    assert_eq!(
        (&result["status"], &result["reason"]),
        (&json!("rejected"), &json!("image_error")),
        "{result}"
    );
    drop(served);
    let done = house.hutch(&["layer", "pull", &name, "--json"]);
    assert_eq!((done.code, done.json()["image"].as_str()), (0, Some(name.as_str())), "{done:?}");
}

fn served_ids(answer: &serde_json::Value) -> Vec<String> {
    let rows = answer.as_array().or_else(|| answer["jobs"].as_array()).expect("rows");
    rows.iter().filter_map(|row| row["id"].as_str().map(str::to_owned)).collect()
}

#[test]
fn layers_are_removed_and_unpacked_again() {
    let Some(house) = house_with_busybox() else { return };
    let job = json!({"layers": ["image:test/busybox:1"], "command": ["echo", "there"]});
    let digest = house.hutch(&["layer", "list", "--json"]).json()["layers"][0]["layer"]
        .as_str()
        .expect("layer")
        .to_owned();
    let done = house.hutch(&["layer", "gc", "--older-than", "0s", "--json"]);
    assert_eq!(done.json()["removed"], 1, "{done:?}");
    assert_eq!(run(&house, &job)["stdout"]["text"], "there\n", "what is needed is unpacked again");
    let done = house.hutch(&["layer", "remove", &digest]);
    assert!(done.code != 0 && done.stderr.contains("remove the image first"), "{done:?}");
    assert_eq!(house.hutch(&["layer", "remove", "test/busybox:1", &digest]).code, 0);
    let result = run(&house, &json!({"layers": [digest], "command": ["true"]}));
    assert_eq!(result["reason"], "image_error", "{result}");
    assert!(house.hutch(&["layer", "import", "nowhere.tar"]).stderr.contains("there is no nowhere.tar"));
    let garbage = house.file("garbage.tar", &"no tar ".repeat(1_000));
    let done = house.hutch(&["layer", "import", &garbage]);
    assert!(
        done.code != 0 && done.stderr.contains("garbage.tar") || done.stderr.contains("layer"),
        "{done:?}"
    );
}

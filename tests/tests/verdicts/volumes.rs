//! Volumes: those that the worker keeps, and directories of the host.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use hutch_proto::Reason;
use serde_json::{Value, json};

use crate::fixture;
use crate::row::{Row, Spec, holds, row, same, sh};

pub(crate) fn rows() -> Vec<Row> {
    [named(), of_the_host(), refused()].into_iter().flatten().collect()
}

fn with(script: &str, volumes: Value) -> Spec {
    sh(script).set("volumes", volumes)
}

fn named() -> Vec<Row> {
    let at = |name: &str, target: &str| json!([{"volume": name, "target": target}]);
    vec![
        row("a volume keeps what is written", with("echo hello > /v/x; mkdir /v/d; stat -c %u:%g /v/x", at("kept", "/v")))
            .stdout("1001:1001\n")
            .then(with("cat /data/x; stat -c %u:%g /data/x; rmdir /data/d", at("kept", "/data")))
            .stdout("hello\n1001:1001\n")
            .then(with("ls /v", at("kept", "/v")))
            .stdout("x\n"),
        row("a volume is others' too", with("echo mine > /v/x", at("shared", "/v")).set("user", json!("5:5")))
            .then(with("cat /v/x; echo more > /v/y; stat -c %u /v/x /v/y; rm /v/x", at("shared", "/v")).set("user", json!("6:6")))
            .exits(1)
            .stdout("mine\n5\n6\n"),
        row("a volume that may not be written", with("echo x > /v/x", at("fixed", "/v")))
            .then(with("cat /v/x; touch /v/y", json!([{"volume": "fixed", "target": "/v", "read_only": true}])))
            .exits(1)
            .stdout("x\n")
            .check(|result| {
                let said = crate::row::text(&result.stderr);
                holds(said.contains("Read-only"), || said)
            }),
        row("a volume below directories that are made", with("cd /a/b/c && touch x && pwd", at("deep", "/a/b/c"))).stdout("/a/b/c\n"),
        row("a volume over one of the layer's directories", with("ls /usr/share; touch /usr/share/x", at("cover", "/usr/share"))).stdout(""),
        row("two volumes", with("echo a > /a/x; echo b > /b/x; cat /a/x /b/x", json!([
            {"volume": "first", "target": "/a"}, {"volume": "second", "target": "/b"},
        ])))
        .stdout("a\nb\n"),
        row("a volume in a volume", with("touch /a/x /a/b/y; ls /a /a/b", json!([
            {"volume": "outer", "target": "/a"}, {"volume": "inner", "target": "/a/b"},
        ])))
        .stdout("/a:\nb\nx\n\n/a/b:\ny\n"),
        row("a volume in every step", crate::row::steps(json!([
            {"name": "a", "command": ["sh", "-c", "echo 1 >> /v/x"]}, {"name": "b", "command": ["sh", "-c", "echo 2 >> /v/x; cat /v/x"]},
        ])).set("volumes", at("steps", "/v")))
        .stdout("1\n2\n"),
        row("what is in a volume is no output", with("echo x > /v/x; echo y > /tmp/y", at("outside", "/v")).set("outputs", json!({"paths": ["/v/**", "/tmp/**"]})))
            .outputs(&["/tmp/y"]),
        row("a file that is written into a volume", with("cat /v/given", at("given", "/v")).file("/v/given", "here\n", "0644"))
            .stdout("here\n")
            .then(with("cat /v/given", at("given", "/v")))
            .stdout("here\n"),
        row("a volume is not the disk", with("head -c 3000000 /dev/zero > /v/x && echo done", at("large", "/v")).limits(json!({"disk_bytes": 1 << 20})))
            .stdout("done\n"),
        row("setuid bits in a volume give nothing", with("cp /usr/bin/id /v/id; chmod 4755 /v/id", at("setuid", "/v")).set("user", json!("root")))
            .then(with("/v/id -u; /v/id -ru", at("setuid", "/v")))
            .stdout("1001\n1001\n"),
    ]
}

fn of_the_host() -> Vec<Row> {
    let dir = fixture("volume");
    let open = dir.join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(dir.join("data"), "host's\n").unwrap();
    fs::write(dir.join("secret"), "secret\n").unwrap();
    fs::set_permissions(dir.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    let at =
        |path: &Path, read_only: Value| json!([{"host_path": path, "target": "/v", "read_only": read_only}]);
    let read_write = json!(false);
    let made = open.join("made");
    vec![
        row(
            "a directory of the host, read-only unless said otherwise",
            with("cat /v/data; touch /v/open/x", at(&dir, Value::Null)),
        )
        .exits(1)
        .stdout("host's\n"),
        row(
            "a directory of the host that may be written",
            with("echo made > /v/made && cat /v/made", at(&open, read_write.clone())),
        )
        .stdout("made\n")
        .on_host(move || {
            let meta = fs::metadata(&made).map_err(|e| e.to_string())?;
            same("length", &meta.len(), &5)?;
            same("owner", &meta.uid(), &1001)
        }),
        row(
            "a job is a stranger to the host's files",
            with(
                "cat /v/secret; touch /v/x; chmod 777 /v/data; rm -f /v/data; exit 3",
                at(&dir, read_write.clone()),
            )
            .set("user", json!("root")),
        )
        .exits(3)
        .stdout("")
        .check(|result| {
            let refusals = crate::row::text(&result.stderr);
            let count =
                refusals.matches("Permission denied").count() + refusals.matches("not permitted").count();
            same("refusals", &count, &4)
        }),
        row(
            "a file of the job's where only the host may write",
            with("exit 0", at(&dir, read_write)).file("/v/x", "", "0644"),
        )
        .refused(Reason::SpecInvalid, &["files[0]", "/v/x"]),
    ]
}

fn refused() -> Vec<Row> {
    let dir = fixture("refused");
    fs::create_dir(dir.join("real")).unwrap();
    fs::write(dir.join("file"), "").unwrap();
    symlink("real", dir.join("link")).unwrap();
    let at = |path: &Path| json!([{"host_path": path, "target": "/v"}]);
    vec![
        row("a directory of the host that is not there", with("exit 0", at(Path::new("/no/such/dir"))))
            .refused(Reason::VolumeError, &["volumes[0]", "/no/such/dir"]),
        row("a directory of the host that is a file", with("exit 0", at(&dir.join("file"))))
            .refused(Reason::VolumeError, &["volumes[0]"]),
        row("a directory of the host behind a link", with("exit 0", at(&dir.join("link"))))
            .refused(Reason::VolumeError, &["volumes[0]"]),
        row("a volume over a file", with("exit 0", json!([{"volume": "v", "target": "/etc/passwd"}])))
            .refused(Reason::VolumeError, &["volumes[0]", "/etc/passwd"]),
        row("a volume below a file", with("exit 0", json!([{"volume": "v", "target": "/etc/passwd/x"}])))
            .refused(Reason::VolumeError, &["volumes[0]"]),
        row(
            "a volume in one that may not be written",
            with(
                "exit 0",
                json!([
                    {"volume": "ro", "target": "/a", "read_only": true}, {"volume": "v", "target": "/a/b"},
                ]),
            ),
        )
        .refused(Reason::VolumeError, &["volumes[1]", "/a/b"]),
    ]
}

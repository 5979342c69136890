//! Layers that are tars of somebody else's making: 53 to 56. The finer cases are tests of the unpacking itself.

use std::fs;

use serde_json::json;

use crate::attack::{Attack, Outcome};
use crate::site::Site;

/// A tar whose headers say what these entries say: type, path, link, content.
fn tar(entries: &[(tar::EntryType, &str, &str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, path, link, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).expect("append");
    }
    builder.into_inner().expect("tar")
}

/// Imports a layer with the site's binary: what was said.
fn import(site: &Site, name: &str, bytes: &[u8], more: &[(&str, &str)]) -> (bool, String) {
    let file = site.place("tars").join(name);
    fs::write(&file, bytes).expect("write");
    let mut command = site.command(&[], &["layer", "import", file.to_str().expect("utf-8")]);
    let done = command.envs(more.iter().copied()).output().expect("import");
    (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
}

use tar::EntryType::{Link, Regular, Symlink, XHeader};

#[test]
fn a53_tars_that_lead_out() {
    Attack::new(
        "53: a tar with `..`, links that are written through, hard links out, whiteouts of what is outside",
        "every entry is made below the tree's own root, by descriptors",
        |site| {
            let outside = site.place("outside");
            fs::write(outside.join("victim"), "alive").expect("victim");
            let out = outside.to_str().expect("utf-8");
            let tars = [
                tar(&[(Regular, "../../../../../../../../tmp/hutch-escaped", "", b"x")]),
                tar(&[(Symlink, "l", out, b""), (Regular, "l/escaped", "", b"x")]),
                tar(&[(Symlink, "l", out, b""), (Regular, "l/.wh.victim", "", b"")]),
                tar(&[(Link, "h", "../../../../../../etc/passwd", b"")]),
                tar(&[(Symlink, "l", "/etc", b""), (Link, "h", "l/passwd", b"")]),
            ];
            for (number, bytes) in tars.iter().enumerate() {
                let _ = import(site, &format!("{number}.tar"), bytes, &[]);
            }
            let left: Vec<_> =
                fs::read_dir(&outside).expect("read").map(|e| e.expect("entry").file_name()).collect();
            let escaped = std::path::Path::new("/tmp/hutch-escaped").exists();
            Outcome::held_if(left == ["victim"] && !escaped, format!("outside: {left:?}"))
        },
    )
    .control(|| Ok("tar -P makes them".to_owned()))
    .has_no_switch("there is no unpacking by path")
    .run();
}

#[test]
fn a54_tars_that_two_readers_read_differently() {
    Attack::new("54: PAX headers that disagree on sizes", "refused", |site| {
        let bytes = tar(&[(XHeader, "pax", "", b"13 size=1024\n"), (Regular, "f", "", b"content")]);
        let (taken, said) = import(site, "pax.tar", &bytes, &[]);
        Outcome::held_if(!taken && said.contains("disagree"), said)
    })
    .has_no_switch("one reader alone is asked")
    .run();
}

#[test]
fn a55_tars_that_grow() {
    Attack::new(
        "55: a compressed bomb, ten million entries, a huge PAX header",
        "caps on bytes, entries, headers",
        |site| {
            let zeros = vec![0; 64 << 20];
            let bomb = zstd::encode_all(tar(&[(Regular, "big", "", &zeros)]).as_slice(), 1).expect("zstd");
            let small =
                [("HUTCH__WORKER__MAX_LAYER_BYTES", "1MiB"), ("HUTCH__WORKER__MAX_LAYER_ENTRIES", "100")];
            let header = vec![b'x'; 2 << 20];
            let many = vec![(Regular, "f", "", &b""[..]); 200];
            let cases = [
                ("bomb.tar.zst", bomb, "more than 1048576 bytes"),
                ("many.tar", tar(&many), "more than 100 entries"),
                (
                    "header.tar",
                    tar(&[(XHeader, "pax", "", &header), (Regular, "f", "", b"")]),
                    "an extension header of 2097152 bytes",
                ),
            ];
            for (name, bytes, wanted) in cases {
                let (taken, said) = import(site, name, &bytes, &small);
                if taken || !said.contains(wanted) {
                    return Outcome::Through(format!("{name}: {said}"));
                }
            }
            let left =
                fs::read_dir(site.place("data-of-a-command").join("trees/tmp")).map_or(0, Iterator::count);
            Outcome::held_if(left == 0, format!("{left} left half unpacked"))
        },
    )
    .has_no_switch("what is beyond a cap is not read")
    .run();
}

#[test]
fn a56_bytes_under_a_wrong_digest() {
    Attack::new("56: other bytes under a layer's digest", "hashed before the layer is there", |site| {
        let (taken, said) = import(site, "good.tar", &tar(&[(Regular, "f", "", b"good")]), &[]);
        assert!(taken, "{said}");
        let data = site.place("data-of-a-command");
        let found = std::process::Command::new("find")
            .arg(&data)
            .args(["-path", "*blobs/sha256/*", "-type", "f"])
            .output();
        let found = String::from_utf8_lossy(&found.expect("find").stdout).into_owned();
        let blob = found.lines().next().expect("a blob");
        fs::write(blob, tar(&[(Regular, "f", "", b"evil")])).expect("damage");
        let listed = site.command(&[], &["layer", "list", "--json"]).output().expect("list");
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).expect("json");
        let layer = listed["layers"][0]["layer"].clone();
        let _ = site.command(&[], &["layer", "gc", "--older-than", "0s"]).output().expect("gc");
        let spec = site.place("spec").join("job.json");
        fs::write(&spec, json!({"layers": ["host", layer], "command": ["cat", "/f"]}).to_string())
            .expect("write");
        let ran = site.command(&[], &["run", "--json", spec.to_str().expect("utf-8")]).output().expect("run");
        let result =
            String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        Outcome::held_if(result.contains("damaged") && !result.contains("evil"), result)
    })
    .has_no_switch("a layer is what has its digest")
    .run();
}

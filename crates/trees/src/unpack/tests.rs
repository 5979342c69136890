use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use tar::{Builder, EntryType, Header};

use super::*;

const CAPS: Caps = Caps { bytes: 64 << 20, entries: 10_000 };

/// A tar that is made entry by entry, names as they are given.
struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(mut self, kind: EntryType, path: &str, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_mtime(1_000);
        let owner = nix::unistd::getuid().as_raw();
        header.set_uid(owner.into());
        header.set_gid(nix::unistd::getgid().as_raw().into());
        // Past the library, which refuses what we want to see refused.
        let gnu = header.as_gnu_mut().expect("gnu");
        gnu.name[..path.len()].copy_from_slice(path.as_bytes());
        gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).expect("append");
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.add(EntryType::Regular, path, "", content.as_bytes())
    }

    fn dir(self, path: &str) -> Self {
        self.add(EntryType::Directory, path, "", b"")
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Symlink, path, target, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("tar")
    }
}

fn unpacked(bytes: &[u8], caps: Caps) -> (tempfile::TempDir, Result<Unpacked, UnpackError>) {
    let outer = tempfile::tempdir().expect("directory");
    let fs = outer.path().join("fs");
    fs::create_dir(&fs).expect("fs");
    let root = File::open(&fs).expect("open");
    let result = unpack(bytes, std::os::fd::AsFd::as_fd(&root), Owners::AsInTar, caps);
    (outer, result)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .expect("read")
        .map(|e| e.expect("entry").file_name().into_string().expect("name"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_layer_is_as_its_tar_says() {
    let layer = Layer::new()
        .dir("./")
        .dir("bin/")
        .file("bin/tool", "#!/bin/sh\n")
        .link("bin/same", "tool")
        .add(EntryType::Link, "bin/hard", "bin/tool", b"")
        .file("deep/er/file", "made its parents")
        .add(EntryType::Fifo, "fifo", "", b"")
        .add(EntryType::Char, "null", "", b"");
    let bytes = layer.bytes();
    let (outer, result) = unpacked(&bytes, CAPS);
    let result = result.expect("unpacked");
    let fs = outer.path().join("fs");
    assert_eq!(names(&fs), ["bin", "deep", "fifo"], "a device is never made");
    assert_eq!(fs::read_to_string(fs.join("bin/same")).expect("read"), "#!/bin/sh\n");
    assert_eq!(
        fs::metadata(fs.join("bin/hard")).expect("hard").ino(),
        fs::metadata(fs.join("bin/tool")).expect("tool").ino()
    );
    assert_eq!(fs::metadata(fs.join("bin")).expect("bin").mtime(), 1_000, "set when all in it was made");
    assert_eq!(fs::metadata(fs.join("bin/tool")).expect("tool").permissions().mode() & 0o7777, 0o755);
    assert_eq!((result.entries, result.newest_s), (8, 1_000));
    assert_eq!(result.bytes, bytes.len() as u64);
}

#[test]
fn the_diff_id_is_that_of_the_uncompressed_bytes() {
    let plain = Layer::new().file("a", "a").bytes();
    let zstd = zstd::encode_all(plain.as_slice(), 1).expect("zstd");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("gzip");
    let gzip = gzip.finish().expect("gzip");
    let ids: Vec<_> =
        [&plain, &zstd, &gzip].map(|bytes| unpacked(bytes, CAPS).1.expect("unpacked").diff_id).to_vec();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

#[test]
fn deletions_become_what_overlayfs_reads() {
    let layer = Layer::new()
        .file("dir/.wh.gone", "")
        .file("opaque/kept", "")
        .file("opaque/.wh..wh..opq", "")
        .file(".wh.back", "")
        .file("back/again", "")
        .file("there", "")
        .file(".wh.there", "")
        .file(".wh..wh.plnk", "");
    let (outer, result) = unpacked(&layer.bytes(), CAPS);
    result.expect("unpacked");
    let fs = outer.path().join("fs");
    let gone = fs::symlink_metadata(fs.join("dir/gone")).expect("whiteout");
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    for opaque in ["opaque", "back"] {
        let marked = crate::root::OPAQUE
            .iter()
            .any(|name| xattr::get(fs.join(opaque), name).is_ok_and(|v| v.is_some()));
        assert!(marked, "{opaque} hides what is below it");
    }
    assert_eq!(names(&fs), ["back", "dir", "opaque", "there"]);
    assert!(fs.join("there").is_file(), "what a layer has itself is not deleted by it");
}

#[test]
fn nothing_is_made_outside() {
    let outside = tempfile::tempdir().expect("outside");
    let place = outside.path().to_str().expect("path");
    let attacks = [
        ("dots", Layer::new().file("../escaped", "x")),
        ("dots within", Layer::new().dir("a").file("a/../../escaped", "x")),
        ("absolute", Layer::new().file(&format!("{place}/escaped"), "x")),
        ("link, then through it", Layer::new().link("out", place).file("out/escaped", "x")),
        ("relative link", Layer::new().link("out", "../..").file("out/escaped", "x")),
        ("link of links", Layer::new().link("a", "..").link("b", "a/..").file("b/escaped", "x")),
        ("link as the file itself", Layer::new().link("f", &format!("{place}/escaped")).file("f", "x")),
        ("directory over a link", Layer::new().link("d", place).dir("d").file("d/escaped", "x")),
        ("hard link out", Layer::new().add(EntryType::Link, "h", "../../etc/passwd", b"")),
        (
            "hard link through a link",
            Layer::new().link("l", "/etc").add(EntryType::Link, "h", "l/passwd", b""),
        ),
        ("whiteout out", Layer::new().file("../.wh.victim", "")),
        ("whiteout through a link", Layer::new().link("out", place).file("out/.wh.victim", "")),
        ("opaque through a link", Layer::new().link("out", place).file("out/.wh..wh..opq", "")),
        ("whiteout of dots", Layer::new().file(".wh...", "")),
    ];
    for (name, layer) in attacks {
        fs::write(outside.path().join("victim"), "alive").expect("victim");
        let (outer, _) = unpacked(&layer.bytes(), CAPS);
        assert_eq!(names(outside.path()), ["victim"], "{name}");
        assert_eq!(names(outer.path()), ["fs"], "{name}");
        assert_eq!(fs::read_to_string(outside.path().join("victim")).expect("victim"), "alive", "{name}");
        let passwd = fs::metadata("/etc/passwd").expect("passwd");
        for entry in names(&outer.path().join("fs")) {
            let made = fs::symlink_metadata(outer.path().join("fs").join(entry)).expect("entry");
            assert_ne!((made.dev(), made.ino()), (passwd.dev(), passwd.ino()), "{name}");
        }
    }
}

#[test]
fn an_absolute_link_leads_to_the_trees_own_place() {
    let layer = Layer::new().dir("usr/bin").link("bin", "/usr/bin").file("bin/tool", "x");
    let (outer, result) = unpacked(&layer.bytes(), CAPS);
    result.expect("unpacked");
    assert!(outer.path().join("fs/usr/bin/tool").is_file());
}

#[test]
fn bombs_stop_at_a_cap() {
    let zeros = vec![0; 4 << 20];
    let bomb = Layer::new().add(EntryType::Regular, "big", "", &zeros).bytes();
    let bomb = zstd::encode_all(bomb.as_slice(), 1).expect("zstd");
    let caps = Caps { bytes: 1 << 20, entries: 10 };
    assert!(bomb.len() < 10_000, "{}", bomb.len());
    let error = unpacked(&bomb, caps).1.expect_err("bomb");
    assert!(matches!(error, UnpackError::TooLarge { what: "bytes", most: 1_048_576 }), "{error}");
    let many = (0..11).fold(Layer::new(), |layer, n| layer.file(&format!("f{n}"), ""));
    let error = unpacked(&many.bytes(), caps).1.expect_err("entries");
    assert!(matches!(error, UnpackError::TooLarge { what: "entries", most: 10 }), "{error}");
    let pax = Layer::new().add(EntryType::XHeader, "pax", "", &vec![b'x'; 2 << 20]).file("f", "");
    let error = unpacked(&pax.bytes(), CAPS).1.expect_err("header").to_string();
    assert!(error.contains("an extension header of 2097152 bytes"), "{error}");
}

#[test]
fn headers_that_disagree_are_refused() {
    // A reader that trusts the PAX size sees one file; one that trusts the header sees the hidden entry in it.
    let layer = Layer::new().add(EntryType::XHeader, "pax", "", b"13 size=1024\n").file("f", "content");
    let error = unpacked(&layer.bytes(), CAPS).1.expect_err("sizes").to_string();
    assert!(error.contains("disagree on its size"), "{error}");
    let cut = Layer::new().add(EntryType::Regular, "f", "", &[b'x'; 4096]).bytes();
    let error = unpacked(&cut[..2048], CAPS).1.expect_err("cut");
    assert!(matches!(error, UnpackError::Malformed(_)), "{error}");
    let error = unpacked(b"no tar at all, but long enough to be one of those", CAPS).1.expect_err("no tar");
    assert!(!error.is_transient(), "{error}");
}

#[test]
fn holes_stay_holes() {
    let mut content = vec![0; 8 << 20];
    content[4 << 20] = 1;
    let (outer, result) = unpacked(&Layer::new().add(EntryType::Regular, "f", "", &content).bytes(), CAPS);
    result.expect("unpacked");
    let file = outer.path().join("fs/f");
    assert_eq!(fs::read(&file).expect("read"), content);
    assert!(fs::metadata(&file).expect("file").blocks() * 512 < 1 << 20);
}

#[test]
fn overlayfs_is_told_nothing_by_a_tar() {
    let record = |key: &str, value: &str| {
        let length = key.len() + value.len() + 3;
        let length = length + if length + 2 > 99 { 3 } else { 2 };
        format!("{length} {key}={value}\n")
    };
    let pax = [
        record("SCHILY.xattr.user.note", "kept"),
        record("SCHILY.xattr.trusted.overlay.redirect", "/etc"),
        record("SCHILY.xattr.user.overlay.opaque", "y"),
        record("SCHILY.xattr.security.capability", "x"),
    ]
    .concat();
    let layer = Layer::new().add(EntryType::XHeader, "pax", "", pax.as_bytes()).dir("d");
    let (outer, result) = unpacked(&layer.bytes(), CAPS);
    result.expect("unpacked");
    let kept: Vec<_> = xattr::list(outer.path().join("fs/d")).expect("list").collect();
    assert_eq!(kept, ["user.note"]);
}

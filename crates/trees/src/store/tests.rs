use super::*;

const CAPS: Caps = Caps { bytes: 1 << 20, entries: 100 };

fn layer(name: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, b"x".as_slice()).expect("append");
    tar.into_inner().expect("tar")
}

#[test]
fn a_layer_is_there_whole_or_not_at_all() {
    let dir = tempfile::tempdir().expect("directory");
    let store = TreeStore::open(&dir.path().join("layers"), Owners::Own).expect("store");
    let (digest, facts) = store.add_unknown(layer("a").as_slice(), CAPS).expect("added");
    assert_eq!(fs::read(store.tree(&digest).join("a")).expect("read"), b"x");
    assert_eq!(store.facts(&digest), Some(facts.clone()));
    assert_eq!(store.add(&digest, io::empty(), CAPS).expect("there already"), facts);
    let wrong = store.add(&digest_of("other"), layer("b").as_slice(), CAPS).expect_err("another digest");
    assert!(matches!(wrong, UnpackError::WrongDigest { .. }), "{wrong}");
    assert_eq!(store.list().expect("list").len(), 1);
    assert_eq!(fs::read_dir(store.tmp()).expect("tmp").count(), 0, "nothing is left of what failed");
    let used = store.open_tree(&digest).expect("open").expect("there");
    assert!(!store.remove(&digest).expect("in use"), "what a job uses stays");
    drop(used);
    assert!(store.remove(&digest).expect("removed") && !store.remove(&digest).expect("gone"));
    assert!(store.facts(&digest).is_none());
    assert_eq!(fs::read_dir(store.tmp()).expect("tmp").count(), 0);
}

fn digest_of(text: &str) -> Digest {
    use sha2::Digest as _;
    Digest::from_sha256(sha2::Sha256::digest(text).into())
}

#[test]
fn what_a_killed_process_left_is_swept_and_what_a_living_one_makes_is_not() {
    let dir = tempfile::tempdir().expect("directory");
    let store = TreeStore::open(dir.path(), Owners::Own).expect("store");
    let left = store.tmp().join("left-over");
    fs::create_dir_all(left.join("fs/deep/tree")).expect("left over");
    let living = Temporary::make(&store.tmp()).expect("living");
    TreeStore::open(dir.path(), Owners::Own).expect("again");
    assert!(!left.exists());
    assert!(living.path.exists());
}

#[test]
fn a_store_is_its_owners_alone() {
    let dir = tempfile::tempdir().expect("directory");
    let store = dir.path().join("layers");
    TreeStore::open(&store, Owners::Own).expect("store");
    assert_eq!(fs::metadata(&store).expect("store").permissions().mode() & 0o777, 0o700);
}

//! On real directories.

use std::convert::Infallible;

use super::*;

fn store() -> (tempfile::TempDir, BlobStore) {
    let directory = tempfile::tempdir().expect("directory");
    let store = BlobStore::in_directory(&directory.path().join("store")).expect("store");
    (directory, store)
}

fn file_with(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(bytes).expect("write");
    file
}

fn on_disk(directory: &tempfile::TempDir, digest: &Digest) -> PathBuf {
    directory.path().join("store/blobs/sha256").join(digest.hex())
}

#[tokio::test]
async fn bytes_come_back_under_their_digest() {
    let (directory, store) = store();
    let stored = store.put(Bytes::from_static(b"hello")).await.expect("put");
    assert_eq!(stored, Stored { digest: Hasher::digest_of(b"hello"), bytes: 5 });
    assert_eq!(fs::read(on_disk(&directory, &stored.digest)).expect("on disk"), b"hello");
    assert!(store.exists(&stored.digest).await.expect("exists"));
    assert_eq!(&store.get(&stored.digest, 5).await.expect("get")[..], b"hello");
    assert_eq!(store.put(Bytes::from_static(b"hello")).await.expect("again"), stored);
}

#[tokio::test]
async fn what_is_not_there_is_said_so() {
    let (_directory, store) = store();
    let digest = Hasher::digest_of(b"never");
    assert!(!store.exists(&digest).await.expect("exists"));
    let error = store.get(&digest, 1).await.expect_err("not there");
    assert!(matches!(error, StoreError::NotFound(_)) && !error.is_transient(), "{error}");
    assert!(error.to_string().contains("upload it first"));
}

#[tokio::test]
async fn a_cap_holds_before_anything_is_read() {
    let (_directory, store) = store();
    let stored = store.put(Bytes::from_static(b"hello")).await.expect("put");
    let error = store.get(&stored.digest, 4).await.expect_err("too large");
    assert!(matches!(error, StoreError::TooLarge { bytes: 5, most: 4 }), "{error}");
}

#[tokio::test]
async fn damage_is_seen() {
    let (directory, store) = store();
    let stored = store.put(Bytes::from_static(b"hello")).await.expect("put");
    fs::write(on_disk(&directory, &stored.digest), b"HELLO").expect("damage");
    let error = store.get(&stored.digest, 5).await.expect_err("damaged");
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn files_of_every_size_are_kept_whole() {
    let (_directory, store) = store();
    let large = usize::try_from(ONE_PART).expect("size");
    for size in [0, 1, CHUNK, large - 1, large, large + 7] {
        let bytes: Vec<u8> = (0..size).map(|n| (n % 251).to_le_bytes()[0]).collect();
        let digest = Hasher::digest_of(&bytes);
        let stored = store.put_file(file_with(&bytes), &digest).await.expect("put");
        assert_eq!(stored.bytes, size as u64);
        assert_eq!(store.get(&digest, u64::MAX).await.expect("get"), bytes, "{size}");
    }
}

#[tokio::test]
async fn a_file_with_another_digest_is_not_kept() {
    let (_directory, store) = store();
    let expected = Hasher::digest_of(b"something else");
    let large = vec![7; usize::try_from(ONE_PART).expect("size") + 1];
    for bytes in [b"hello".as_slice(), &large] {
        let error = store.put_file(file_with(bytes), &expected).await.expect_err("another digest");
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(!store.exists(&expected).await.expect("exists"));
    }
}

fn stream_of(pieces: &[&'static [u8]]) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin + use<> {
    let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece))).collect();
    futures::stream::iter(pieces)
}

#[tokio::test]
async fn a_stream_is_kept_up_to_its_cap() {
    let (directory, store) = store();
    let stored = store.put_stream(stream_of(&[b"hel", b"lo"]), 5).await.expect("put");
    assert_eq!(stored.digest, Hasher::digest_of(b"hello"));
    let error = store.put_stream(stream_of(&[b"hel", b"lo!"]), 5).await.expect_err("too large");
    assert!(matches!(error, StoreError::TooLarge { bytes: 6, most: 5 }), "{error}");
    assert_eq!(fs::read_dir(directory.path().join("store/tmp")).expect("spool").count(), 0);
}

#[tokio::test]
async fn the_directory_is_its_owner_s_alone() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("open");
    fs::create_dir(&path).expect("make");
    fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("open it");
    BlobStore::in_directory(&path).expect("store");
    assert_eq!(fs::metadata(&path).expect("stat").permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_wrong_address_is_told_what_would_be_right() {
    for url in ["/srv/hutch", "file://relative", "ftp://host/x", ""] {
        let error = BlobStore::open(url).expect_err(url).to_string();
        assert!(error.contains("file:///var/lib/hutch"), "{error}");
    }
}

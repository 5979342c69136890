//! One file out of an archive, on its way to a reader: nothing is unpacked, nothing is kept.
//!
//! The compressed bytes come from the store, a thread looks through them entry by entry, and the
//! bytes of the file go on as they come. Whether they are those that the result names is known at
//! the end: if not, the answer breaks off before its last byte.

use std::io::{self, Read};

use axum::body::{Body, Bytes};
use futures::TryStreamExt;
use hutch_layers::{BlobStore, Hasher};
use hutch_proto::{Digest, OutputFile};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::problem::Problem;

/// How much is passed on at a time.
const PIECE: usize = 64 << 10;
/// How many pieces may wait for the reader.
const WAITING: usize = 4;
/// The most bytes that an archive is unpacked to while a file is looked for.
const MOST_PLAIN: u64 = 64 << 30;

/// The bytes of this file, as a body.
pub(crate) async fn file(blobs: &BlobStore, archive: &Digest, file: &OutputFile) -> Result<Body, Problem> {
    let (_, stream) = blobs.stream(archive).await?;
    let reader = SyncIoBridge::new(StreamReader::new(stream.map_err(io::Error::other)));
    let (begun, found) = oneshot::channel();
    let (sender, receiver) = mpsc::channel(WAITING);
    let wanted = Wanted { path: file.path.clone(), bytes: file.bytes, sha256: file.sha256.clone() };
    tokio::task::spawn_blocking(move || wanted.send(reader, begun, &sender));
    match found.await {
        Ok(Ok(())) => Ok(Body::from_stream(ReceiverStream::new(receiver))),
        Ok(Err(error)) => Err(Problem::internal(format!("the archive cannot be read: {error}"))),
        Err(_) => {
            Err(Problem::not_found(format!("`{}` was not kept: the archive ends before it", file.path)))
        }
    }
}

/// The file that is looked for.
struct Wanted {
    path: String,
    bytes: u64,
    sha256: Option<String>,
}

/// Where pieces go.
type Pieces = mpsc::Sender<io::Result<Bytes>>;

impl Wanted {
    /// Looks for the file; says once whether it is there, then sends its bytes.
    fn send(&self, archive: impl Read, begun: oneshot::Sender<io::Result<()>>, pieces: &Pieces) {
        let mut begun = Some(begun);
        let done = self.look_through(archive, &mut begun, pieces);
        match (done, begun) {
            (Err(error), Some(begun)) => {
                // Whoever asked may be gone; then nobody wants to know.
                let _ = begun.send(Err(error));
            }
            (Err(error), None) => {
                let _ = pieces.blocking_send(Err(error));
            }
            (Ok(()), _) => {}
        }
    }

    fn look_through(
        &self,
        archive: impl Read,
        begun: &mut Option<oneshot::Sender<io::Result<()>>>,
        pieces: &Pieces,
    ) -> io::Result<()> {
        let plain = zstd::Decoder::new(archive)?.take(MOST_PLAIN);
        let mut archive = tar::Archive::new(plain);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let is_file =
                entry.header().entry_type().is_file() || entry.header().entry_type().is_gnu_sparse();
            if is_file && shown(&entry.path_bytes()) == self.path {
                let Some(begun) = begun.take() else { return Ok(()) };
                return begun.send(Ok(())).map_or(Ok(()), |()| self.pass_on(&mut entry, pieces));
            }
        }
        Ok(())
    }

    /// Passes the bytes on; the last piece only if all were as they should be.
    fn pass_on(&self, entry: &mut impl Read, pieces: &Pieces) -> io::Result<()> {
        let mut hasher = Hasher::new();
        let mut held: Option<Bytes> = None;
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            entry.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
            if piece.is_empty() {
                break;
            }
            hasher.update(&piece);
            if let Some(before) = held.replace(piece.into())
                && pieces.blocking_send(Ok(before)).is_err()
            {
                return Ok(());
            }
        }
        let whole = hasher.bytes() == self.bytes;
        let hash = hasher.finish();
        if !whole || self.sha256.as_ref().is_some_and(|sha256| sha256 != hash.hex()) {
            return Err(io::Error::other("the archive's bytes are not those of the result"));
        }
        if let Some(last) = held {
            // A reader that is gone needs no last piece.
            let _ = pieces.blocking_send(Ok(last));
        }
        Ok(())
    }
}

/// A path of the archive as results show it: from the root; bytes that are not UTF-8, and control
/// characters, as `\xNN`.
fn shown(path: &[u8]) -> String {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let mut text = String::from("/");
    let escape = |text: &mut String, bytes: &[u8]| {
        text.extend(bytes.iter().map(|byte| format!("\\x{byte:02x}")));
    };
    for chunk in path.strip_prefix(b"/").unwrap_or(path).utf8_chunks() {
        for letter in chunk.valid().chars() {
            if letter.is_control() {
                escape(&mut text, letter.to_string().as_bytes());
            } else {
                text.push(letter);
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

#[cfg(test)]
mod tests {
    use hutch_proto::OutputKind;

    use super::*;

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, *data).expect("append");
        }
        zstd::encode_all(&builder.into_inner().expect("tar")[..], 0).expect("zstd")
    }

    fn output(path: &str, data: &[u8]) -> OutputFile {
        OutputFile {
            path: path.to_owned(),
            kind: OutputKind::File,
            mode: None,
            bytes: data.len() as u64,
            sha256: Some(Hasher::digest_of(data).hex().to_owned()),
            target: None,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_file_comes_out_whole_or_not_at_all() {
        let blobs = BlobStore::open("memory:///").expect("store");
        let large = vec![7_u8; PIECE * 3 + 5];
        let stored = blobs
            .put(archive(&[("box/a", b"hi"), ("box/large", &large), ("box/empty", b"")]).into())
            .await
            .expect("put");
        for (path, data) in [("/box/a", &b"hi"[..]), ("/box/large", &large), ("/box/empty", b"")] {
            let body = file(&blobs, &stored.digest, &output(path, data)).await.expect(path);
            assert_eq!(axum::body::to_bytes(body, usize::MAX).await.expect(path), data, "{path}");
        }
        let missing = file(&blobs, &stored.digest, &output("/box/b", b"")).await.expect_err("missing");
        assert_eq!(missing.status.as_u16(), 404);
        let body = file(&blobs, &stored.digest, &output("/box/a", b"ho")).await.expect("begun");
        assert!(axum::body::to_bytes(body, usize::MAX).await.is_err(), "other bytes than the result says");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_no_archive_is_said_so() {
        let blobs = BlobStore::open("memory:///").expect("store");
        let stored = blobs.put(Bytes::from_static(b"no archive")).await.expect("put");
        let problem = file(&blobs, &stored.digest, &output("/a", b"")).await.expect_err("no archive");
        assert_eq!(problem.status.as_u16(), 500);
    }

    #[test]
    fn names_are_shown_as_in_results() {
        assert_eq!(shown(b"box/a"), "/box/a");
        assert_eq!(shown(b"./box/\xff"), "/box/\\xff");
        assert_eq!(shown(b"box/a\nb"), "/box/a\\x0ab");
    }
}

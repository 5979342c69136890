//! Fetches the blobs that a job names, so that the engine sees bytes alone.

use hutch_layers::{BlobStore, StoreError};
use hutch_proto::{Content, JobSpec, Problem};

/// Why a job's inputs could not be had.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The job names something that cannot be given to it; another try would end the same.
    #[error("{0}")]
    Wrong(Problem),
    /// The store failed; another try may do better.
    #[error("{}: {}", .path, .source.full())]
    Store {
        /// The field that names the blob.
        path: String,
        /// What went wrong.
        source: StoreError,
    },
}

/// Puts the bytes of every blob in place of its name, at most `most` bytes in all.
///
/// # Errors
/// [`InputError`], with the field that names the blob.
pub async fn resolve(job: &mut JobSpec, blobs: &BlobStore, most: u64) -> Result<(), InputError> {
    let mut left = most;
    for (path, content) in contents(job) {
        let Content::Blob(digest) = &*content else { continue };
        let bytes = match blobs.get(digest, left).await {
            Ok(bytes) => bytes,
            Err(StoreError::TooLarge { bytes, .. }) => {
                let message = format!("{digest} has {bytes} bytes; a job's blobs may have {most} together");
                return Err(InputError::Wrong(Problem::new(path, message)));
            }
            Err(error @ StoreError::NotFound(_)) => {
                return Err(InputError::Wrong(Problem::new(path, error.to_string())));
            }
            Err(source) => return Err(InputError::Store { path, source }),
        };
        left = left.saturating_sub(bytes.len() as u64);
        *content = Content::Inline(bytes.into());
    }
    Ok(())
}

/// Every content of a job, with the path of its field.
fn contents(job: &mut JobSpec) -> impl Iterator<Item = (String, &mut Content)> {
    let stdin = job.stdin.iter_mut().map(|content| ("stdin".to_owned(), content));
    let files = job.files.iter_mut().enumerate().map(|(n, file)| (format!("files[{n}]"), &mut file.content));
    let steps =
        job.steps.iter_mut().enumerate().filter_map(|(n, step)| {
            step.stdin.as_mut().map(|content| (format!("steps[{n}].stdin"), content))
        });
    stdin.chain(files).chain(steps)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use hutch_layers::Hasher;

    use super::*;

    fn job(digest: &str) -> JobSpec {
        let json = format!(
            r#"{{"layers": ["host"], "stdin": {{"blob": "{digest}"}},
                "files": [{{"path": "/a", "text": "x"}}, {{"path": "/b", "blob": "{digest}"}}],
                "steps": [{{"name": "s", "command": ["true"], "stdin": {{"blob": "{digest}"}}}}]}}"#
        );
        JobSpec::parse(json.as_bytes()).expect("spec")
    }

    #[tokio::test]
    async fn bytes_take_the_place_of_every_blob() {
        let blobs = BlobStore::open("memory:///").expect("store");
        let stored = blobs.put(Bytes::from_static(b"in")).await.expect("put");
        let mut job = job(&stored.digest.to_string());
        resolve(&mut job, &blobs, 6).await.expect("resolved");
        assert_eq!(job.stdin, Some(Content::inline("in")));
        assert_eq!(job.files[0].content, Content::inline("x"));
        assert_eq!(job.files[1].content, Content::inline("in"));
        assert_eq!(job.steps[0].stdin, Some(Content::inline("in")));
    }

    #[tokio::test]
    async fn what_cannot_be_given_is_named() {
        let blobs = BlobStore::open("memory:///").expect("store");
        let missing = Hasher::digest_of(b"missing").to_string();
        let error = resolve(&mut job(&missing), &blobs, 9).await.expect_err("missing").to_string();
        assert!(error.starts_with("stdin: blob sha256:") && error.contains("upload"), "{error}");
        let stored = blobs.put(Bytes::from_static(b"in")).await.expect("put");
        let error = resolve(&mut job(&stored.digest.to_string()), &blobs, 5).await.expect_err("large");
        assert!(error.to_string().starts_with("steps[0].stdin: "), "{error}");
        assert!(error.to_string().contains("may have 5 together"), "{error}");
    }
}

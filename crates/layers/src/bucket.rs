//! A store that several machines share: a bucket of S3, or of what speaks its language.
//!
//! Who may use it comes from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
//! `AWS_REGION`, `AWS_ENDPOINT`), or from the machine's own role.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};

use crate::StoreError;

/// How often a request is repeated before the caller hears of it.
const RETRIES: usize = 3;
/// How long all tries of a request may take together.
const RETRY_TIME: Duration = Duration::from_secs(20);

/// The store at `url`, of which `rest` is the bucket and, after a slash, the prefix.
pub(crate) fn open(url: &str, rest: &str) -> Result<Arc<dyn ObjectStore>, StoreError> {
    // Only the first call in a process sets it; all set the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let retry =
        RetryConfig { backoff: BackoffConfig::default(), max_retries: RETRIES, retry_timeout: RETRY_TIME };
    let plain = ["AWS_ENDPOINT", "AWS_ENDPOINT_URL"]
        .iter()
        .any(|name| std::env::var(name).is_ok_and(|endpoint| endpoint.starts_with("http://")));
    let store = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_allow_http(plain)
        .with_retry(retry)
        .build()
        .map_err(|error| StoreError::Url { url: url.to_owned(), message: error.to_string() })?;
    let prefix = prefix.trim_matches('/');
    Ok(if prefix.is_empty() { Arc::new(store) } else { Arc::new(PrefixStore::new(store, prefix)) })
}

//! One page of a list, read item by item while it arrives. kube collects an answer, copies it and builds all
//! objects at once, so whoever may create objects would decide how much memory a list takes. Depends on kube
//! alone; called by `watch`, and by programs that list for themselves.

use std::time::Duration;

use http::{Response, header::RETRY_AFTER};
use http_body_util::{BodyExt as _, Limited};
use kube::{
    Api, Resource,
    api::{ListMeta, ListParams, Request},
    client::Body,
    core::Status,
};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::error::Category;
use tracing::warn;

/// Where a page ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The version of the whole list.
    pub version: String,
    /// The token for the next page; `None` on the last one.
    pub next: Option<String>,
}

/// Why a page could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The API server has too much to do, and names a time in which it is not to be asked.
    #[error("the API server is overloaded, and asks for a pause of {} s", .retry_after.as_secs())]
    Overloaded {
        /// That time, within bounds.
        retry_after: Duration,
        /// The answer.
        #[source]
        source: kube::Error,
    },
    /// The API server refuses, or cannot be reached.
    #[error("the request failed")]
    Request(#[source] kube::Error),
    /// The answer is longer than the caller allows.
    #[error("the API server's answer is longer than {limit_bytes} bytes: none of it is used")]
    TooLong {
        /// What is allowed.
        limit_bytes: usize,
    },
    /// The answer is no list, or has an item that is not as the API has it. Without the cause, which quotes
    /// the item.
    #[error("the API server's answer is no list that can be read ({0:?})")]
    Unreadable(Category),
    /// Without a version nothing can be watched from there on.
    #[error("the API server's list has no resourceVersion")]
    Unversioned,
}

/// Of an answer that is no success.
const REFUSAL_LIMIT_BYTES: usize = 64 * 1024;

/// The longest pause that an answer can ask for.
const RETRY_AFTER_LIMIT: Duration = Duration::from_mins(5);

impl ListError {
    /// For how long the API server is not to be asked again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }

    /// Whether the API server's cache does not have the version yet. client-go recognizes the answer by its
    /// message too (`IsTooLargeResourceVersionError`); the 504 of a load balancer is another one.
    pub fn is_version_too_large(&self) -> bool {
        let Self::Request(kube::Error::Api(status)) = self else { return false };
        status.code == 504 && status.message.contains("Too large resource version")
    }

    /// Whether a list of the committed state may succeed where this one, from the cache, has not: the cache
    /// does not have the version, the version is of another cluster, or the list is too long for one page.
    pub fn is_of_the_cache(&self) -> bool {
        match self {
            Self::Request(kube::Error::Api(status)) => is_final(status.code) || self.is_version_too_large(),
            Self::TooLong { .. } => true,
            _ => false,
        }
    }
}

/// Whether a status means that the same request is refused again, for what it asks. The others of this class
/// are about the client's rights, or pass.
pub(super) fn is_final(code: u16) -> bool {
    matches!(code, 400..=499) && !matches!(code, 401 | 403 | 404 | 429)
}

/// Reads one page, and gives each item to `each` as soon as it is complete. `limit_bytes` bounds the answer,
/// as the client's layers pass it on; one item is in memory at a time.
///
/// # Errors
/// See [`ListError`]. What `each` was given by then is part of a list, and proves no object absent.
///
/// # Cancel safety
/// Dropping the future drops the request.
pub async fn list_page<K>(
    api: &Api<K>,
    params: &ListParams,
    limit_bytes: usize,
    mut each: impl FnMut(K),
) -> Result<Page, ListError>
where
    K: Resource + Clone + DeserializeOwned,
{
    let requests = Request::new(api.resource_url());
    let request = if K::metadata_api() { requests.list_metadata(params) } else { requests.list(params) };
    let request = request.map_err(|error| ListError::Request(kube::Error::BuildRequest(error)))?;
    let client = api.clone().into_client();
    let answer = client.send(request.map(Body::from)).await.map_err(ListError::Request)?;
    let mut body = success(answer).await?;
    let mut splitter = Splitter::default();
    let mut room = limit_bytes;
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(ListError::Request)?.into_data() else { continue };
        room = room.checked_sub(piece.len()).ok_or(ListError::TooLong { limit_bytes })?;
        let taken: Result<(), serde_json::Error> = splitter.take(&piece, |item| {
            match read(item)? {
                Some(item) => each(item),
                None => warn!("an object of a list cannot be read: it is passed over"),
            }
            Ok(())
        });
        taken.map_err(unreadable)?;
    }
    splitter.finish()
}

/// An item of a list; `None` where it is well-formed and not of this kind, or nested too deeply: the others
/// count.
fn read<K: DeserializeOwned>(item: &[u8]) -> Result<Option<K>, serde_json::Error> {
    match serde_json::from_slice(item) {
        Ok(item) => Ok(Some(item)),
        Err(_) if serde_json::from_slice::<IgnoredAny>(item).is_ok() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The body of a success.
async fn success(answer: Response<Body>) -> Result<Body, ListError> {
    let code = answer.status();
    if code.is_success() {
        return Ok(answer.into_body());
    }
    let retry_after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let text = Limited::new(answer.into_body(), REFUSAL_LIMIT_BYTES).collect().await;
    let status = text.ok().and_then(|text| serde_json::from_slice::<Status>(&text.to_bytes()).ok());
    // Not every answer is the API server's: a proxy's may be a page of HTML.
    let status = status.unwrap_or_else(|| Status::failure(code.as_str(), "no Status"));
    let source = kube::Error::Api(status.with_code(code.as_u16()).boxed());
    Err(match retry_after.filter(|_| matches!(code.as_u16(), 429 | 503)) {
        Some(secs) => {
            ListError::Overloaded { retry_after: Duration::from_secs(secs).min(RETRY_AFTER_LIMIT), source }
        }
        None => ListError::Request(source),
    })
}

fn unreadable(error: serde_json::Error) -> ListError {
    ListError::Unreadable(error.classify())
}

/// Splits the text of a list into its items. `items` is the only array at the top of a list, so its name is
/// not looked at. A text that is no JSON becomes an item or a rest that cannot be read.
#[derive(Debug, Default)]
struct Splitter {
    /// How many objects and arrays are open.
    depth: usize,
    in_items: bool,
    in_string: bool,
    is_escaped: bool,
    /// The present item, as far as it has arrived.
    item: Vec<u8>,
    /// The list without its items.
    rest: Vec<u8>,
}

/// The list without its items.
#[derive(Deserialize)]
struct Rest {
    metadata: ListMeta,
}

impl Splitter {
    /// Gives each item that `piece` completes to `each`.
    fn take<E>(&mut self, piece: &[u8], mut each: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        for byte in piece {
            self.take_byte(*byte, &mut each)?;
        }
        Ok(())
    }

    fn take_byte<E>(&mut self, byte: u8, each: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if self.in_string {
            self.in_string = byte != b'"' || self.is_escaped;
            self.is_escaped = byte == b'\\' && !self.is_escaped;
            self.keep(byte);
            return Ok(());
        }
        let is_between_items = self.in_items && self.depth == 2;
        match byte {
            b'{' | b'[' => {
                self.depth += 1;
                self.keep(byte);
                self.in_items |= self.depth == 2 && byte == b'[';
            }
            b'}' | b']' => {
                if is_between_items {
                    self.finish_item(each)?;
                    self.in_items = false;
                }
                self.depth = self.depth.saturating_sub(1);
                self.keep(byte);
            }
            b',' if is_between_items => self.finish_item(each)?,
            b' ' | b'\t' | b'\r' | b'\n' => {}
            _ => {
                self.in_string = byte == b'"';
                self.keep(byte);
            }
        }
        Ok(())
    }

    fn keep(&mut self, byte: u8) {
        let text = if self.in_items { &mut self.item } else { &mut self.rest };
        text.push(byte);
    }

    fn finish_item<E>(&mut self, mut each: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if !self.item.is_empty() {
            each(&self.item)?;
            self.item.clear();
        }
        Ok(())
    }

    fn finish(self) -> Result<Page, ListError> {
        let Rest { metadata } = serde_json::from_slice(&self.rest).map_err(unreadable)?;
        let is_given = |text: &String| !text.is_empty();
        let version = metadata.resource_version.filter(is_given).ok_or(ListError::Unversioned)?;
        Ok(Page { version, next: metadata.continue_.filter(is_given) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn split(text: &str, size: usize) -> (Vec<Value>, Result<Page, ListError>) {
        let (mut splitter, mut items) = (Splitter::default(), Vec::new());
        for piece in text.as_bytes().chunks(size) {
            let taken: Result<(), serde_json::Error> = splitter.take(piece, |item| {
                items.push(serde_json::from_slice(item)?);
                Ok(())
            });
            if let Err(error) = taken {
                return (items, Err(unreadable(error)));
            }
        }
        (items, splitter.finish())
    }

    #[test]
    fn an_item_that_is_too_deep_or_of_another_kind_keeps_none_of_the_others_away() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));

        assert_eq!(read::<Value>(deep.as_bytes()).unwrap(), None);
        assert_eq!(read::<u32>(b"\"text\"").unwrap(), None);
        assert_eq!(read::<u32>(b"7").unwrap(), Some(7));
        assert!(read::<Value>(b"[1").is_err(), "not well-formed");
    }

    #[test]
    fn gives_the_items_of_a_list_in_whatever_pieces_it_comes() {
        let items = [
            json!({"metadata": {"name": "a", "annotations": {"k": "],[{\"}\\"}}, "spec": {"list": [[1], [2]]}}),
            json!({}),
            json!(["no object", {"a": []}]),
            json!("a, b"),
            json!(1),
        ];
        let list = json!({
            "apiVersion": "v1", "items": items, "kind": "PodList",
            "metadata": {"resourceVersion": "7", "continue": "token", "remainingItemCount": 3},
        });
        let page = Page { version: "7".into(), next: Some("token".into()) };

        for text in [list.to_string(), serde_json::to_string_pretty(&list).unwrap() + "\n"] {
            for size in [1, 2, 3, 7, 64, usize::MAX] {
                let (found, end) = split(&text, size);
                assert_eq!(found, items, "in pieces of {size} bytes");
                assert_eq!(end.unwrap(), page);
            }
        }
    }

    #[test]
    fn the_last_page_has_no_token_and_an_empty_list_no_items() {
        for items in ["[]", "[ ]", "null"] {
            let text = format!(r#"{{"metadata":{{"resourceVersion":"7","continue":""}},"items":{items}}}"#);

            let (found, end) = split(&text, 5);

            assert!(found.is_empty(), "{items}");
            assert_eq!(end.unwrap(), Page { version: "7".into(), next: None });
        }
    }

    #[test]
    fn what_is_no_whole_list_is_an_error_that_quotes_nothing() {
        let text = r#"{"metadata":{"resourceVersion":"7"},"items":[{"name":"secret"}]}"#;
        assert!(split(text, 9).1.is_ok());

        for cut in 0..text.len() {
            let (_, end) = split(&text[..cut], 9);
            assert!(matches!(end, Err(ListError::Unreadable(_))), "cut at {cut}");
        }
        let (_, end) = split(&text.replace("\"secret\"", "secret"), 9);
        assert!(!end.unwrap_err().to_string().contains("secret"));
        for no_list in ["", "x", "[]", "{}", "]]", r#"{"kind":"Status"}"#] {
            assert!(matches!(split(no_list, 9).1, Err(ListError::Unreadable(_))), "{no_list}");
        }
        let unversioned = split(r#"{"metadata":{},"items":[]}"#, 9).1;
        assert!(matches!(unversioned, Err(ListError::Unversioned)));
    }
}

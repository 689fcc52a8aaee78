//! What follows `sqlite:` in an address, and what it means: a path, or a database in memory.
//!
//! It is read as SQLite reads its URIs, by this module alone: SQLite itself is given a whole path and
//! no URI. What cannot be honoured is refused. A refusal names an option only if SQLite knows it; any
//! other text may be a secret that was pasted.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The name of a database in memory.
const MEMORY: &str = ":memory:";

/// The path, or `None` for a database in memory. `address` is `PATH?OPTIONS`, also behind `//`, or
/// `file:` and then SQLite's form; `%20` and its like are decoded.
///
/// # Errors
///
/// What to write instead.
pub(crate) fn parse(address: &str) -> Result<Option<PathBuf>, String> {
    let address = address.trim();
    let (path, options) = address.split_once('?').unwrap_or((address, ""));
    let mut in_memory = false;
    let mut shared = false;
    for option in options.split('&').filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("mode", "rwc") | ("cache", "private") => {}
            ("mode", "memory") => in_memory = true,
            ("mode", "ro") => {
                return Err("`mode=ro` cannot be honoured, because items are written".to_owned());
            }
            ("mode", "rw") => {
                return Err("leave out `mode=rw`: a file that is missing is made".to_owned());
            }
            ("mode", _) => return Err("`mode` may be `rwc` or `memory`".to_owned()),
            ("cache", "shared") => shared = true,
            (known @ ("cache" | "immutable" | "modeof" | "nolock" | "psow" | "vfs"), _) => {
                return Err(format!("leave out the option `{known}`"));
            }
            _ => return Err("it has an unknown option behind the `?`: leave it out".to_owned()),
        }
    }
    let path = path.strip_prefix("//").unwrap_or(path);
    let path = match path.split_at_checked("file:".len()) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("file:") => without_authority(rest)?,
        _ => path,
    };
    if in_memory || path == MEMORY || path == "/:memory:" {
        return Ok(None);
    }
    if shared {
        return Err("`cache=shared` is for a database in memory: leave it out".to_owned());
    }
    file(path).map(Some)
}

/// The path of a `file:` URI: no host, or this one, may stand before it.
fn without_authority(uri: &str) -> Result<&str, String> {
    let Some(rest) = uri.strip_prefix("//") else {
        return Ok(uri);
    };
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    if path.starts_with('/') {
        Ok(path)
    } else {
        Err("write `file:PATH`, or `file:///PATH` for a whole path".to_owned())
    }
}

fn file(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() {
        return Err("a path is missing; `sqlite::memory:` keeps nothing".to_owned());
    }
    if text.contains('#') {
        return Err("write `#` as `%23`".to_owned());
    }
    // RFC 3986, 4.2: what stands before a colon in the first segment is a scheme.
    let first = text.split('/').next().unwrap_or_default();
    if first.contains(':') {
        return Err(
            "write `./` before a name with a colon; a database in memory is `sqlite::memory:`"
                .to_owned(),
        );
    }
    let bytes: Vec<u8> = percent_encoding::percent_decode_str(text).collect();
    if bytes.iter().any(u8::is_ascii_control) {
        return Err("a name has no control characters (such as %00)".to_owned());
    }
    let path = PathBuf::from(OsString::from_vec(bytes));
    if text.ends_with('/') || Path::file_name(&path).is_none() || text.ends_with("/.") {
        return Err("it names a folder: write the file's name behind it".to_owned());
    }
    if path.file_name().is_some_and(|name| name == MEMORY) {
        return Err(format!(
            "a file cannot be called `{MEMORY}`; a database in memory is `sqlite::memory:`"
        ));
    }
    Ok(path)
}

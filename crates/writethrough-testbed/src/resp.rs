//! A minimal client of the Redis protocol (RESP2): one connection for each command.
//!
//! It never retries and remembers nothing, so that a test sees the very server that answers now.

use std::fmt;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What a Redis server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A status such as `OK`.
    Status(String),
    /// An error, with its code in front.
    Error(String),
    /// An integer.
    Integer(i64),
    /// A string of bytes.
    Bulk(Vec<u8>),
    /// A list.
    Array(Vec<Self>),
    /// No value.
    Nil,
}

impl Reply {
    /// The text of a status, or of a string of bytes; `None` for anything else.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Status(text) => Some(text.clone()),
            Self::Bulk(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        }
    }

    /// The value of an integer; `None` for anything else.
    pub fn integer(&self) -> Option<i64> {
        match self {
            Self::Integer(number) => Some(*number),
            _ => None,
        }
    }

    /// Whether there is no value.
    pub fn is_nil(&self) -> bool {
        *self == Self::Nil
    }

    /// Parses one reply; returns it and its length, or `None` while it is incomplete.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
            return Ok(None);
        };
        let line = std::str::from_utf8(&bytes[..end]).map_err(|_| Malformed)?;
        let (kind, rest) = line.split_at_checked(1).ok_or(Malformed)?;
        let mut length = end + 2;
        let number = || rest.parse::<i64>().map_err(|_| Malformed);
        let reply = match kind {
            "+" => Self::Status(rest.to_owned()),
            "-" => Self::Error(rest.to_owned()),
            ":" => Self::Integer(number()?),
            "$" | "*" if number()? < 0 => Self::Nil,
            "$" => {
                let size = usize::try_from(number()?).map_err(|_| Malformed)?;
                let Some(body) = bytes.get(length..length + size + 2) else {
                    return Ok(None);
                };
                length += size + 2;
                Self::Bulk(body[..size].to_vec())
            }
            "*" => {
                let mut items = Vec::new();
                for _ in 0..number()? {
                    let Some((item, size)) = Self::parse(&bytes[length..])? else {
                        return Ok(None);
                    };
                    length += size;
                    items.push(item);
                }
                Self::Array(items)
            }
            _ => return Err(Malformed),
        };
        Ok(Some((reply, length)))
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(text) | Self::Error(text) => f.write_str(text),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Bulk(bytes) => f.write_str(&String::from_utf8_lossy(bytes)),
            Self::Nil => f.write_str("(nil)"),
            Self::Array(items) => f
                .debug_list()
                .entries(items.iter().map(Self::to_string))
                .finish(),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Malformed;

/// Sends one command over a new connection and returns the answer, whatever it is. The caller bounds it.
pub(crate) async fn ask(addr: SocketAddr, command: &[&str]) -> std::io::Result<Reply> {
    let mut stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    let mut request = format!("*{}\r\n", command.len()).into_bytes();
    for word in command {
        request.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
    stream.write_all(&request).await?;
    let mut answer = Vec::new();
    loop {
        match Reply::parse(&answer) {
            Ok(Some((reply, _))) => return Ok(reply),
            Ok(None) => {}
            Err(Malformed) => return Err(std::io::ErrorKind::InvalidData.into()),
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_read_whole_or_not_at_all() {
        let bytes = b"*4\r\n+OK\r\n:-7\r\n$3\r\na\r\n\r\n*2\r\n$-1\r\n-ERR no\r\n";
        let expected = Reply::Array(vec![
            Reply::Status("OK".to_owned()),
            Reply::Integer(-7),
            Reply::Bulk(b"a\r\n".to_vec()),
            Reply::Array(vec![Reply::Nil, Reply::Error("ERR no".to_owned())]),
        ]);
        assert_eq!(Reply::parse(bytes), Ok(Some((expected, bytes.len()))));
        for end in 0..bytes.len() {
            assert_eq!(Reply::parse(&bytes[..end]), Ok(None), "{end} bytes");
        }
    }

    #[test]
    fn what_is_not_a_reply_is_malformed() {
        assert_eq!(Reply::parse(b"HTTP/1.1 200 OK\r\n"), Err(Malformed));
        assert_eq!(Reply::parse(b":x\r\n"), Err(Malformed));
        assert_eq!(Reply::parse(b"\r\n"), Err(Malformed));
    }
}

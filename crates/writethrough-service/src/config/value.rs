//! The text of one setting: how it is cleaned, and what of it may be shown.
//!
//! What a setting that connects somewhere holds may be a secret in any form, so a text that was not
//! understood is never shown, only its [`form`].

/// The schemes that [`form`] names: those of connections, as people write them. Anything else
/// before `://` may be a part of a secret.
const SCHEMES: &[&str] = &[
    "amqp",
    "cockroachdb",
    "file",
    "grpc",
    "http",
    "https",
    "jdbc:mysql",
    "jdbc:postgresql",
    "mariadb",
    "memcached",
    "mongodb",
    "mysql",
    "oracle",
    "pgsql",
    "postgis",
    "postgres",
    "postgresql",
    "postgresql+asyncpg",
    "postgresql+psycopg",
    "postgresql+psycopg2",
    "psql",
    "redis",
    "redis+cluster",
    "redis+sentinel",
    "redis+tls",
    "redis+unix",
    "redis-sentinel",
    "rediss",
    "sqlite",
    "sqlserver",
    "tcp",
    "tls",
    "unix",
    "valkey",
    "valkeys",
];

/// A setting's text without the white space and the one pair of quotes around it; `None` when
/// nothing is left. The same for every setting: files of variables come with CRLF and with quotes.
///
/// # Errors
///
/// What to use instead of a text with a control character in it, or one that is not UTF-8.
pub fn cleaned(text: &str) -> Result<Option<String>, &'static str> {
    let text = text.trim();
    let unquoted = ['"', '\''].into_iter().find_map(|quote| {
        let text = text.strip_prefix(quote)?.strip_suffix(quote)?;
        Some(text.trim())
    });
    let text = unquoted.unwrap_or(text);
    if text.contains(char::is_control) {
        return Err("use one line, without control characters in it");
    }
    if text.contains(char::REPLACEMENT_CHARACTER) {
        return Err("use UTF-8");
    }
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// What may be said of a text that may hold a secret: what kind of text it is, and how long.
#[must_use]
pub fn form(text: &str) -> String {
    let length = match text.chars().count() {
        1 => "1 character".to_owned(),
        count => format!("{count} characters"),
    };
    let scheme = text.split_once("://").map(|(scheme, _)| {
        let scheme = scheme.to_ascii_lowercase();
        SCHEMES.iter().find(|known| **known == scheme)
    });
    match scheme {
        Some(Some(scheme)) => format!("a URL with scheme `{scheme}`, {length}"),
        Some(None) => format!("a URL with another scheme, {length}"),
        None => format!("a text without a scheme, {length}"),
    }
}

/// A text as it may be shown when it was not meant to connect anywhere. A URL, or the part of one that
/// has a password, was put there by mistake, and it is hidden.
#[must_use]
pub fn shown(text: &str) -> String {
    const LONGEST: usize = 100;
    if text.contains("://") || text.contains('@') {
        return form(text);
    }
    if text.chars().count() > LONGEST {
        let start: String = text.chars().take(LONGEST).collect();
        return format!("{start:?}...");
    }
    format!("{text:?}")
}

/// Whether a text can be the name or the address of a host. Any other character is a part of
/// something that was not understood, such as a password with `@` in it.
#[must_use]
pub fn is_host(text: &str) -> bool {
    text.parse::<std::net::IpAddr>().is_ok()
        || (!text.is_empty()
            && text
                .chars()
                .all(|letter| letter.is_alphanumeric() || matches!(letter, '.' | '-' | '_')))
}

/// The name of a query option as it may be shown, or how many options are before it. A name is not
/// shown when it could be the rest of a password.
#[must_use]
pub fn option_name(position: usize, name: &str, after_password: bool) -> String {
    let is_name = (1..=40).contains(&name.len())
        && name
            .chars()
            .all(|letter| letter.is_ascii_alphabetic() || matches!(letter, '_' | '-'));
    if is_name && !after_password {
        format!("`?{name}=`")
    } else {
        format!("the query's option number {}", position + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_and_one_pair_of_quotes_around_a_value_go() {
        for (text, expected) in [
            ("a", Some("a")),
            (" a\r\n", Some("a")),
            ("\t\"a\" ", Some("a")),
            ("'a'", Some("a")),
            ("\"'a'\"", Some("'a'")),
            ("\"a'", Some("\"a'")),
            ("\"", Some("\"")),
            ("a b", Some("a b")),
            ("", None),
            (" \r\n", None),
            ("\"\"", None),
        ] {
            assert_eq!(cleaned(text), Ok(expected.map(str::to_owned)), "{text:?}");
        }
        for text in ["a\rb", "a\nb", "a\0b", "\u{7f}a", "a\u{fffd}b"] {
            assert!(cleaned(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_form_says_nothing_of_the_content() {
        assert_eq!(
            form("POSTGRES://u:hunter2"),
            "a URL with scheme `postgres`, 20 characters"
        );
        assert_eq!(
            form("hunter2://hunter2"),
            "a URL with another scheme, 17 characters"
        );
        assert_eq!(
            form("Pwd=hunter2"),
            "a text without a scheme, 11 characters"
        );
        assert_eq!(form("x"), "a text without a scheme, 1 character");
    }

    #[test]
    fn what_may_hold_a_password_is_shown_by_its_form() {
        assert_eq!(shown("127.0.0.1:x"), "\"127.0.0.1:x\"");
        for text in ["redis://h", "u:hunter2@h:6379"] {
            assert_eq!(shown(text), form(text));
        }
    }

    #[test]
    fn hosts_are_names_and_addresses_only() {
        for host in ["h", "db-1.example.org", "a_b", "10.0.0.1", "::1"] {
            assert!(is_host(host), "{host}");
        }
        for other in ["", "h,pw=x", "a@b", "u:p", "a b", "h;Pwd", "[::1"] {
            assert!(!is_host(other), "{other}");
        }
    }
}

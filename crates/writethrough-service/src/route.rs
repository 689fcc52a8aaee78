//! The table of routes: what metrics, admission and access must know of each.

/// A route of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// The path as the router has it.
    pub(crate) path: &'static str,
    /// Asked by orchestrators and scrapers: answered in an overload too, and not traced by itself.
    pub(crate) probe: bool,
    /// For operators: it shows or changes what is not a user's business.
    pub(crate) operator: bool,
    /// Reads and writes items.
    pub(crate) items: bool,
}

impl Route {
    const fn page(path: &'static str) -> Self {
        Self {
            path,
            probe: false,
            operator: false,
            items: false,
        }
    }

    const fn probe(mut self) -> Self {
        self.probe = true;
        self
    }

    const fn operator(mut self) -> Self {
        self.operator = true;
        self
    }

    const fn items(mut self) -> Self {
        self.items = true;
        self
    }

    /// Returns the route of a path that the router has matched.
    pub(crate) fn of(matched: &str) -> Option<&'static Self> {
        ROUTES.iter().find(|route| route.path == matched)
    }
}

/// All routes. The router is tested to have the same.
pub(crate) static ROUTES: [Route; 14] = [
    Route::page("/items/{id}").items(),
    Route::page("/items").items(),
    Route::page("/cache/clear").operator(),
    Route::page("/cache/stats").operator(),
    Route::page("/health").probe(),
    Route::page("/livez").probe(),
    Route::page("/readyz").probe(),
    Route::page("/metrics").probe().operator(),
    Route::page("/openapi.json"),
    Route::page("/openapi-3.1.json"),
    Route::page("/docs"),
    Route::page("/docs/page.js"),
    Route::page("/problems/{slug}"),
    Route::page("/"),
];

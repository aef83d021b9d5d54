"""The scheduler: pairs a prefill and a decode node per request, from live load reports."""

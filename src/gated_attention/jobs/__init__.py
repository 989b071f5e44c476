"""What commands do that is no study: models that exist are analysed and evaluated."""
